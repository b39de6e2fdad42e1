// The same job in Node, as one line of JSON: node node.js THREADS STEPS
import { job } from "./job.js";

const [threads, steps] = process.argv.slice(2).map(Number);
console.log(JSON.stringify(await job.train(threads, steps)));
