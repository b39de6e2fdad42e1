// Finds @tensorflow/tfjs-node-gpu on machines that have it: TensorFlow's own CUDA kernels under TensorFlow.js, in Node.
import { MissingPackageError } from "@switchyard/core";
import type { TfNamespace } from "./tf.ts";

const name = "@tensorflow/tfjs-node-gpu";
const install = `npm install ${name}@4.22.0`;

/**
 * The namespace of @tensorflow/tfjs-node-gpu, imported on first use: `tfjs({ tf: await tfjsNodeGpu() })`. Nearly every kernel of that
 * package calls `util.isNullOrUndefined`, which Node 23 removed: where it is missing it is put back before the import.
 *
 * @throws MissingPackageError with the line that installs it, when the package or its native library is not there.
 */
export async function tfjsNodeGpu<T extends TfNamespace = TfNamespace>(): Promise<T> {
  await restoreUtil();
  try {
    // A variable, so that bundlers for browsers leave it alone. Its namespace is of the type that the caller's copy declares.
    const module: { readonly default?: T } & T = await import(/* @vite-ignore */ name);
    return module.default ?? module;
  } catch (error) {
    throw new MissingPackageError(reason(error), { cause: error });
  }
}

function reason(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  if (/native addon|tfjs_binding|dlopen|libtensorflow/i.test(message)) {
    return (
      `tfjsNodeGpu: ${name} is installed without its native library, which its install script downloads (${message.split("\n")[0]}); ` +
      `run "npm rebuild ${name} --build-addon-from-source" on Linux or Windows with CUDA 11.2 and cuDNN 8.1`
    );
  }
  return `tfjsNodeGpu: ${name} cannot be imported (${message.split("\n")[0]}); run "${install}" on a machine with CUDA, or use another TensorFlow.js backend`;
}

/** Puts back what the package's kernels call and Node 23 removed. */
async function restoreUtil(): Promise<void> {
  // A variable here too: a browser has no such module, and this file must still load there.
  const specifier = "node:util";
  const util: { readonly default: { isNullOrUndefined?: (x: unknown) => boolean } } = await import(
    /* @vite-ignore */ specifier
  );
  util.default.isNullOrUndefined ??= (x) => x === null || x === undefined;
}
