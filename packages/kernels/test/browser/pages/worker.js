// The dedicated worker of a page.
import { exposeInWorker } from "@switchyard/kernels/wasm";
import { makers } from "./backends.js";
import { makeJob } from "./job.js";

exposeInWorker(makeJob(makers));
