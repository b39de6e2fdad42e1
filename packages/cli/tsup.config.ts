import { library } from "../../tools/tsup.ts";

// What bin/switchyard.js runs.
export default library({ entry: { bin: "src/bin.ts" } });
