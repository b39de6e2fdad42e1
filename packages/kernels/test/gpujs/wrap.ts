// gpu.js with something between it and the adapter: tests count what passes, or make it fail.
import { GPU } from "gpu.js";
import type { GpuClass, GpuInstance, GpuKernel, GpuKernelSettings } from "../../src/gpujs/gpu.ts";

export interface Wrap {
  /** Sees the settings of a kernel before gpu.js does. */
  settings?(source: string, settings: GpuKernelSettings): object;
  /** Stands for a call of a kernel. */
  call?(source: string, run: () => unknown, kernel: object): unknown;
  destroyed?(kernel: object): void;
}

export const wrapped = ({ settings: change, call, destroyed }: Wrap): GpuClass =>
  class implements GpuInstance {
    readonly inner: GpuInstance;
    constructor(settings: ConstructorParameters<GpuClass>[0]) {
      this.inner = new GPU(settings);
    }
    createKernel(source: string, settings: GpuKernelSettings): GpuKernel {
      const kernel: GpuKernel = this.inner.createKernel(source, change?.(source, settings) ?? settings);
      return {
        get kernel() {
          return kernel.kernel;
        },
        apply(self, args) {
          const run = () => kernel.apply(self, args);
          return call ? call(source, run, kernel) : run();
        },
        setOutput: (output) => kernel.setOutput(output),
        destroy() {
          destroyed?.(kernel);
          kernel.destroy();
        },
      };
    }
    destroy(): Promise<void> {
      return this.inner.destroy();
    }
  };
