// What CI runs: npm test with a browser and a WebGPU adapter, which it installs where apt-get can; then one closing line that adds
// up all packages. Plain JavaScript: nothing is installed yet.
import { existsSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { npmProgram, root, run } from "./child.mjs";
import { installPackages } from "./system.mjs";

const totals = join(root, ".turbo", "tests.json");
rmSync(totals, { force: true });
await installPackages();
// What npm test skips with a line where it is absent is a failure here; set it to 0 to have that in CI too.
const environment = { SWITCHYARD_REQUIRE_GPU: process.env.SWITCHYARD_REQUIRE_GPU ?? "1" };
const code = await run(process.execPath, [npmProgram(), "test"], { environment });
// Without totals npm test stopped before any test: that counts as one failure.
const { passed, failed } = existsSync(totals) ? JSON.parse(readFileSync(totals, "utf8")) : { passed: 0, failed: 1 };
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = code === 0 && failed === 0 && passed > 0 ? 0 : 1;
