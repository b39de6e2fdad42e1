// Failures that TensorFlow.js does not report: it logs a lost WebGPU device and validation errors, and reads zeros from a lost WebGL
// context. Whoever reads a tensor is told instead.

export interface DeviceWatch {
  /** What went wrong on the device, once something has. */
  failure(): string | undefined;
  /** What `read` settles to; rejects once the device is lost, where the library would wait for ever. */
  reading<T>(read: Promise<T>): Promise<T>;
  stop(): void;
}

/** What is used of a GPUDevice. */
interface WebGpuDevice {
  readonly lost: Promise<{ readonly reason?: string; readonly message: string }>;
  addEventListener(type: "uncapturederror", listener: (event: unknown) => void): void;
  removeEventListener(type: "uncapturederror", listener: (event: unknown) => void): void;
}

/** Watches the device or context inside a TensorFlow.js backend, as far as it has one. */
export function watchDevice(backend: object): DeviceWatch {
  const device: unknown = Reflect.get(backend, "device");
  if (isWebGpu(device)) return watchWebGpu(device);
  const context: unknown = field(Reflect.get(backend, "gpgpu"), "gl");
  const isLost: unknown = field(context, "isContextLost");
  const patient = <T>(read: Promise<T>): Promise<T> => read;
  if (typeof isLost !== "function") return { failure: () => undefined, reading: patient, stop: () => undefined };
  const lost =
    "the WebGL context was lost, and with it all tensors; reload the page or restart the backend, then resume from a checkpoint";
  const canvas: unknown = field(context, "canvas");
  return {
    failure: () => (isLost.call(context) === true ? lost : undefined),
    // The library polls a fence, which a lost context never signals.
    reading: (read) => (canvas instanceof EventTarget ? until(canvas, "webglcontextlost", lost, read) : read),
    stop: () => undefined,
  };
}

/** What `read` settles to; rejects with `message` if the event comes first. */
function until<T>(target: EventTarget, event: string, message: string, read: Promise<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    const listener = (): void => reject(new Error(message));
    target.addEventListener(event, listener);
    read.then(resolve, reject).finally(() => target.removeEventListener(event, listener));
  });
}

function watchWebGpu(device: WebGpuDevice): DeviceWatch {
  let failure: string | undefined;
  device.lost.then(({ reason, message }) => {
    failure ??= `the WebGPU device was lost (${reason ?? "unknown reason"}: ${message || "no message"}), and with it all tensors; start over on a new device from a checkpoint`;
  });
  const listener = (event: unknown): void => {
    failure ??= `the WebGPU device reported an error: ${String(field(field(event, "error"), "message") ?? event)}`;
  };
  device.addEventListener("uncapturederror", listener);
  return {
    failure: () => failure,
    reading: (read) => read,
    stop: () => device.removeEventListener("uncapturederror", listener),
  };
}

const field = (x: unknown, name: string): unknown =>
  typeof x === "object" && x !== null ? Reflect.get(x, name) : undefined;

const isWebGpu = (x: unknown): x is WebGpuDevice =>
  typeof field(x, "addEventListener") === "function" && field(x, "lost") instanceof Promise;
