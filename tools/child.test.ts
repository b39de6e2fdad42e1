// Exit codes and signals pass between the bootstrap and the job.
import { spawn } from "node:child_process";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { expect, test } from "vitest";
import { root, run } from "./child.mjs";

const module = pathToFileURL(join(root, "tools", "child.mjs")).href;

/** Starts a process that runs `job` through run(), sends it a signal once the job says "ready", answers how all ended. */
async function interrupted(job: string, signal: NodeJS.Signals): Promise<{ code: number | null; output: string }> {
  const starter = `import { run } from "${module}"; process.exitCode = await run(process.execPath, ["-e", ${JSON.stringify(job)}]);`;
  const child = spawn(process.execPath, ["--input-type=module", "-e", starter], { stdio: ["pipe", "pipe", "inherit"] });
  let output = "";
  let sent = false;
  for await (const text of child.stdout) {
    output += text;
    if (!sent && output.includes("ready")) sent = child.kill(signal);
  }
  const code = await new Promise<number | null>((resolve) => {
    if (child.exitCode !== null) resolve(child.exitCode);
    else child.once("exit", resolve);
  });
  return { code, output };
}

test("the exit code is the job's", async () => {
  expect(await run(process.execPath, ["-e", "process.exit(5)"])).toBe(5);
});

// Windows has no signals that one process could send to another.
test.skipIf(process.platform === "win32")(
  "an interrupted job is told once, may clean up, and sets the exit code",
  async () => {
    const job = `let n = 0;
    process.on("SIGINT", () => { console.log("told " + ++n); setTimeout(() => process.exit(7), 100); });
    setInterval(() => {}, 1000);
    console.log("ready");`;
    const { code, output } = await interrupted(job, "SIGINT");
    expect(output).toBe("ready\ntold 1\n");
    expect(code).toBe(7);
  },
);

test.skipIf(process.platform === "win32")("a job that a signal ends counts as failed", async () => {
  expect((await interrupted('setInterval(() => {}, 1000); console.log("ready");', "SIGTERM")).code).toBe(128 + 15);
});
