// The exported kernels. Every one has the form kernel(job, from, to, scratch): the job's arguments, a range of its units of work, and memory
// of the calling thread. Results do not depend on how the units are cut into ranges.
export * from "./attention";
export * from "./elementwise";
export { dots, dotsSwiglu, multiply, multiplySwiglu, packColumns } from "./matmul";
export * from "./copy";
export * from "./quantized";
export * from "./reduce";
export * from "./sort";
export * from "./rows";
