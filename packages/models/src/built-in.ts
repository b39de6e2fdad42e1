// The one door to the built-in modules of Node, for the functions that read and write files.
import { UnsupportedError } from "@switchyard/core";

interface BuiltIns {
  readonly "node:crypto": typeof import("node:crypto");
  readonly "node:fs/promises": typeof import("node:fs/promises");
  readonly "node:path": typeof import("node:path");
}

/**
 * Imports a built-in module when a function needs it. The name reaches `import` as a variable: bundlers for browsers
 * resolve a literal even where it never runs, and warn or fail. Throws UnsupportedError outside Node.
 */
export async function builtIn<N extends keyof BuiltIns>(name: N): Promise<BuiltIns[N]> {
  if (globalThis.process?.versions?.node === undefined) {
    throw new UnsupportedError(
      `files are read and written in Node only (${name}); in a browser open downloads with readCheckpoint`,
    );
  }
  return import(/* @vite-ignore */ /* webpackIgnore: true */ name);
}
