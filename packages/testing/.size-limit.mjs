import { limits } from "../../tools/size-limit.mjs";

export default limits();
