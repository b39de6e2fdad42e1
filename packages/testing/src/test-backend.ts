// The backend suite in vitest: one `it` per case, one engine for all of them.
import { type Backend, type Engine, engine } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Tolerance } from "./arrays.ts";
import { backendCases, primitiveNames, uncoveredKernels } from "./backend-cases.ts";
import { readSkips, type Skip } from "./skip.ts";

export interface BackendSuite<H> {
  readonly name: string;
  /** Called once; the suite disposes the backend at its end where it has `dispose`. */
  backend(): Backend<H> | Promise<Backend<H>>;
  readonly skip?: readonly Skip[];
  /** Allowed: absolute + relative * largest magnitude expected. Default 2e-6 and 1e-5, for f32 arithmetic. */
  readonly tolerance?: Partial<Tolerance>;
}

/**
 * Defines a describe block that holds a backend to what core expects of it: each primitive and fused op against naive
 * loops in float64, gradients against central differences, awkward sizes, ties, NaN and infinities, transfers, storage
 * that is given away, live handles after every case, a Mixture-of-Experts layer and training steps.
 *
 * @example
 * testBackend({ name: "cpu", backend: () => cpu() });
 */
export function testBackend<H>({ name, backend, skip = [], tolerance }: BackendSuite<H>): void {
  const cases = backendCases();
  const { reasons, faults } = readSkips(
    skip,
    cases.map((one) => one.name),
  );
  describe(`backend ${name}`, () => {
    let subject: Backend<H> | undefined;
    let on: Engine | undefined;
    const ready = (): Engine => {
      if (!on) throw new Error(`backend ${name} did not start`);
      return on;
    };
    beforeAll(async () => {
      subject = await backend();
      on = engine(subject);
      const uncovered = uncoveredKernels(subject);
      if (uncovered.length > 0) console.warn(`backend ${name}: no case runs the kernels ${uncovered.join(", ")}`);
    });
    afterAll(() => subject?.dispose?.());

    it("skips name cases of this suite and give reasons", () => {
      expect(faults).toEqual([]);
    });
    it("has a kernel for every primitive", () => {
      const kernels = subject?.kernels;
      expect(primitiveNames.filter((primitive) => typeof kernels?.[primitive] !== "function")).toEqual([]);
    });
    for (const one of cases) {
      const reason = reasons.get(one.name);
      if (reason === undefined) it(one.name, () => one.run(ready(), tolerance));
      else it.skip(`${one.name} (skipped: ${reason})`, () => one.run(ready(), tolerance));
    }
    it("has no live handle at the end", () => {
      expect(ready().live()).toBe(0);
    });
  });
  for (const { reason, tests } of skip) console.warn(`backend ${name}: skipped ${tests.join(", ")}: ${reason}`);
}
