// The suite of experts in vitest: one `it` per case.
import { describe, expect, it } from "vitest";
import { type ExpertsSuite, expertsCases } from "./experts-cases.ts";
import { readSkips, type Skip } from "./skip.ts";

/**
 * Defines a describe block that holds a set of experts to what the layer around them expects: rows sorted by expert give
 * what each gives alone (and what a plain loop gives, with `row`), an expert without rows, all rows to one expert, rows
 * beyond the last block give zeros, no rows, one expert; gradients agree with central differences; `mixed` and `fused`
 * equal `apply` where they are there; `observe` is told every matrix; parameters survive saving, wrong ones are refused;
 * no handle is left alive. Cases that do not concern the experts are skipped with the reason.
 *
 * @example
 * testExperts({ name: "ffn", make: (options) => ffn({ ...options, hidden: 5 }) });
 */
export function testExperts({ skip = [], ...suite }: ExpertsSuite & { readonly skip?: readonly Skip[] }): void {
  const cases = expertsCases(suite);
  const { reasons, faults } = readSkips(
    skip,
    cases.map(({ name }) => name),
  );
  describe(`experts ${suite.name}`, () => {
    it("skips name cases of this suite and give reasons", () => {
      expect(faults).toEqual([]);
    });
    for (const one of cases) {
      const reason = reasons.get(one.name) ?? one.reason;
      if (reason === undefined) it(one.name, () => one.run());
      else it.skip(`${one.name} (skipped: ${reason})`, () => one.run());
    }
  });
  for (const { reason, tests } of skip) console.warn(`experts ${suite.name}: skipped ${tests.join(", ")}: ${reason}`);
}
