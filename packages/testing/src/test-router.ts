// The router suite in vitest: one `it` per case.
import { describe, expect, it } from "vitest";
import { type RouterSuite, routerCases } from "./router-cases.ts";
import { readSkips, type Skip } from "./skip.ts";

/**
 * Defines a describe block that holds a router to what the layer around it expects: ids in range, finite weights that
 * obey the documented rule, one answer per seed, symmetry under permutation of the experts, padding that changes
 * nothing, no look ahead where the plugin says so, decoding that equals the whole sequence, gradients that agree with
 * central differences, buffers that survive a step, a state that survives save and load, declarations for wrappers
 * that are true, no tokens, one expert, k = all experts, no handle left alive. Cases
 * that do not concern a router are skipped with the reason.
 *
 * @example
 * testRouter({ plugin: ({ k = 2 }) => topK({ k }), weights: "sum to 1" });
 */
export function testRouter({ skip = [], ...suite }: RouterSuite & { readonly skip?: readonly Skip[] }): void {
  const cases = routerCases(suite);
  const { reasons, faults } = readSkips(
    skip,
    cases.map(({ name }) => name),
  );
  const { name } =
    typeof suite.plugin === "function" ? suite.plugin({ experts: suite.sizes?.experts ?? 5 }) : suite.plugin;
  describe(`router ${name}`, () => {
    it("skips name cases of this suite and give reasons", () => {
      expect(faults).toEqual([]);
    });
    for (const one of cases) {
      const reason = reasons.get(one.name) ?? one.reason;
      if (reason === undefined) it(one.name, () => one.run());
      else it.skip(`${one.name} (skipped: ${reason})`, () => one.run());
    }
  });
  for (const { reason, tests } of skip) console.warn(`router ${name}: skipped ${tests.join(", ")}: ${reason}`);
}
