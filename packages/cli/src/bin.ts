#!/usr/bin/env node
// The program `switchyard`.
import { main } from "./main.ts";
import { quietPipe } from "./pipe.ts";

quietPipe(process.stdout, () => process.exit());
process.exitCode = await main(process.argv.slice(2));
