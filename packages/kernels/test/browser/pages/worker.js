// The dedicated worker of a page.
import { exposeInWorker } from "@switchyard/kernels/wasm";
import { job } from "./job.js";

exposeInWorker(job);
