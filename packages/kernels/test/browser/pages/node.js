// The same job in Node, as one line of JSON: node node.js BACKEND OPTIONS
import { makers } from "./backends.js";
import { makeJob } from "./job.js";

const [name, options] = process.argv.slice(2);
console.log(JSON.stringify(await makeJob(makers).train(name, JSON.parse(options))));
