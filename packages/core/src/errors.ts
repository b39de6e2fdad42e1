// The five error classes of the project. Each carries a `Symbol.for` brand, so that two copies of core recognise each other's errors.

const brand = (name: string): symbol => Symbol.for(`switchyard.error.${name}`);

class SwitchyardError extends Error {
  constructor(name: string, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = name;
    Object.defineProperty(this, brand(name), { value: true });
  }
}

const branded = (name: string, error: unknown): boolean =>
  typeof error === "object" && error !== null && brand(name) in error;

/** Sizes, ranks, dtypes or options that do not fit together. The message prints what was asked and what was found. */
export class ShapeError extends SwitchyardError {
  constructor(message: string, options?: ErrorOptions) {
    super("ShapeError", message, options);
  }
  static isInstance(error: unknown): error is ShapeError {
    return branded("ShapeError", error);
  }
}

/** Something this backend, router or build cannot do, with the reason. */
export class UnsupportedError extends SwitchyardError {
  constructor(message: string, options?: ErrorOptions) {
    super("UnsupportedError", message, options);
  }
  static isInstance(error: unknown): error is UnsupportedError {
    return branded("UnsupportedError", error);
  }
}

/** A file that is damaged, incomplete or not what it claims to be. */
export class CheckpointError extends SwitchyardError {
  constructor(message: string, options?: ErrorOptions) {
    super("CheckpointError", message, options);
  }
  static isInstance(error: unknown): error is CheckpointError {
    return branded("CheckpointError", error);
  }
}

/** An optional package that is not installed; the message names it. */
export class MissingPackageError extends SwitchyardError {
  constructor(message: string, options?: ErrorOptions) {
    super("MissingPackageError", message, options);
  }
  static isInstance(error: unknown): error is MissingPackageError {
    return branded("MissingPackageError", error);
  }
}

/** A device that failed while it worked: lost, out of memory, or an invalid command. What it holds is gone; results are never returned after it. */
export class DeviceError extends SwitchyardError {
  constructor(message: string, options?: ErrorOptions) {
    super("DeviceError", message, options);
  }
  static isInstance(error: unknown): error is DeviceError {
    return branded("DeviceError", error);
  }
}
