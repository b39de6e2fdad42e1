// The backends that need no other library.
import { wasm } from "@switchyard/kernels/wasm";
import { webgpu } from "@switchyard/kernels/webgpu";

export const makers = { wasm, webgpu };
