import { engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { describe, it } from "vitest";
import { primitiveCases } from "./cases/primitives.ts";
import { fusedCases } from "./cases/fused.ts";
for (const precision of [32, 64] as const) describe(`cpu ${precision}`, () => { const e = engine(cpu({ precision }));
for (const c of [...primitiveCases(), ...fusedCases()]) it(c.name, () => c.run(e)); });
