// Skips of the shared suites: each names its cases and a reason; both are printed, and a name that no case has is an
// error.

/** Cases that are left out, and why. */
export interface Skip {
  /** Printed with each skipped case: what the subject cannot do, in words. */
  readonly reason: string;
  /** Exact names of cases. */
  readonly tests: readonly string[];
}

/** Reason of each skipped case, and what is wrong with the skips themselves. */
export function readSkips(
  skips: readonly Skip[],
  names: readonly string[],
): { readonly reasons: ReadonlyMap<string, string>; readonly faults: readonly string[] } {
  const known = new Set(names);
  const reasons = new Map<string, string>();
  const faults: string[] = [];
  for (const { reason, tests } of skips) {
    if (reason.trim() === "") faults.push(`a skip of ${tests.map((test) => `"${test}"`).join(", ")} gives no reason`);
    for (const test of tests) {
      if (!known.has(test))
        faults.push(`skip names "${test}", which is no case of this suite; known: ${near(test, names)}`);
      if (reasons.has(test)) faults.push(`"${test}" is skipped twice`);
      reasons.set(test, reason);
    }
  }
  return { reasons, faults };
}

/** Up to five names that begin alike, or else the first ones. */
function near(test: string, names: readonly string[]): string {
  const start = test.split(/[/ ]/)[0] ?? "";
  const alike = names.filter((name) => name.startsWith(start));
  const shown = (alike.length > 0 ? alike : names).slice(0, 5);
  return `${shown.map((name) => `"${name}"`).join(", ")}${shown.length < names.length ? ", ..." : ""}`;
}
