// The public surface of @switchyard/cli: the command line as functions.
export { type CommandLine, main } from "./main.ts";
export { checkArgs, type RunFile, type RunSettings, type TrainArgs } from "./options.ts";
export {
  causalRouters,
  defaultRouters,
  expertSizes,
  type NamedRouter,
  routerFrom,
  routerNames,
  routersFrom,
  wrapperNames,
} from "./routers.ts";
export { type Size, type SizeName, sizes } from "./sizes.ts";
export { type Display, display, processStreams, type Streams } from "./terminal.ts";
export { type Outcome, type TrainContext, train } from "./train.ts";
