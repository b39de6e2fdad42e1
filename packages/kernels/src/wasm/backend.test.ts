// The shared suite on every build and both ways of running; then what is special to this backend.
import { testBackend } from "@switchyard/testing";
import { create, wasm } from "./backend.ts";

testBackend({ name: "wasm relaxed, 1 thread", backend: () => wasm({ threads: 1, variant: "relaxed" }) });
testBackend({ name: "wasm plain, 1 thread", backend: () => wasm({ threads: 1, variant: "plain" }) });
// Every job is shared, however small.
testBackend({ name: "wasm relaxed, 3 threads", backend: () => create({ threads: 3, variant: "relaxed" }, 0) });
testBackend({ name: "wasm plain, 2 threads", backend: () => create({ threads: 2, variant: "plain" }, 0) });
