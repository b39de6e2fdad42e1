// The examples in READMEs: every ```ts block right after a marker line is run by a test.
//   <!-- example -->         the block is a program for Node
//   <!-- example: test -->   the block is a test file for vitest

export interface Example {
  readonly kind: "program" | "test";
  readonly code: string;
}

export function examples(markdown: string): Example[] {
  const marked = /^<!-- example(: test)? -->\r?\n+```ts\r?\n(.*?)^```/gms;
  return [...markdown.matchAll(marked)].map(([, test, code = ""]) => ({ kind: test ? "test" : "program", code }));
}

/** How many markers there are, whether or not a block follows: a marker without its block is a mistake. */
export function markers(markdown: string): number {
  return markdown.match(/<!-- example/g)?.length ?? 0;
}
