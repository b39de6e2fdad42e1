// The suite of checkpoint families in vitest: one `it` per case.
import { describe, expect, it } from "vitest";
import { type ArchitectureCache, type ArchitectureSuite, architectureCases } from "./architecture-cases.ts";
import { readSkips, type Skip } from "./skip.ts";

/**
 * Defines a describe block that holds a loaded model to what generation and decoding expect of every family: chunks of a prompt equal
 * the whole, rows of a padded batch equal each alone, a cache can be cut and its rows moved, no position looks at later tokens,
 * nothing is left alive. With `engine(cpu({ precision: 64 }))` and a tolerance of 1e-12 only the order of sums is left to differ.
 *
 * @example
 * const open = (engine: Engine) => loadModel("my-model", { engine, architectures: [mine] });
 * testArchitecture({ name: "mine", engine: engine(cpu()), open, prompt: [5, 3, 8, 1, 9, 2, 7, 4, 6, 0] });
 */
export function testArchitecture<Cache extends ArchitectureCache>({
  skip = [],
  ...suite
}: ArchitectureSuite<Cache> & { readonly skip?: readonly Skip[] }): void {
  const cases = architectureCases(suite);
  const { reasons, faults } = readSkips(
    skip,
    cases.map(({ name }) => name),
  );
  describe(`architecture ${suite.name}`, () => {
    it("skips name cases of this suite and give reasons", () => {
      expect(faults).toEqual([]);
    });
    for (const one of cases) {
      const reason = reasons.get(one.name);
      if (reason === undefined) it(one.name, () => one.run());
      else it.skip(`${one.name} (skipped: ${reason})`, () => one.run());
    }
  });
  for (const { reason, tests } of skip)
    console.warn(`architecture ${suite.name}: skipped ${tests.join(", ")}: ${reason}`);
}
