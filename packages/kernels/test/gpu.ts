// The WebGPU of the tests in Node: Dawn, from the npm package `webgpu`, on whatever Vulkan driver the machine has; tools/vitest.ts adds a
// software one.
let found: Promise<GPU | undefined> | undefined;

/** A GPU with an adapter, or undefined after one printed line. SWITCHYARD_REQUIRE_GPU=1 (CI) makes its absence an error. */
export function findGpu(): Promise<GPU | undefined> {
  found ??= search();
  return found;
}

async function search(): Promise<GPU | undefined> {
  const { create, globals } = await import("webgpu");
  Object.assign(globalThis, globals);
  // Software drivers spend most of a shader's compilation on zeroing workgroup memory, which no kernel relies on. Browsers do zero it.
  const gpu: GPU = create(["enable-dawn-features=allow_unsafe_apis,disable_workgroup_init"]);
  if (await gpu.requestAdapter()) return gpu;
  const why =
    "no WebGPU adapter: install a Vulkan driver, or Debian's chromium and libvulkan1 packages for a software one";
  if (process.env.SWITCHYARD_REQUIRE_GPU === "1") throw new Error(why);
  console.warn(`WebGPU tests skipped: ${why}`);
  return undefined;
}
