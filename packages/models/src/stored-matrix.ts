// Matrices in the type in which a checkpoint stores them: what the rest of the package uses of the folder stored/.
export { formsOf, plainStretches, type Stretch } from "./stored/forms.ts";
export {
  below,
  bytesOfHost,
  type HostCodes,
  type HostFloats,
  type HostMatrix,
  nodeKey,
  stack,
} from "./stored/host-matrix.ts";
export {
  floatsOf,
  groupedProduct,
  type LowRank,
  lookup,
  lowRank,
  lowRankNode,
  product,
  withoutLowRank,
} from "./stored/product.ts";
export { checkPiece, pieceNames, readPiece, rowsOf, type StoredForm } from "./stored/read-piece.ts";
export { readSource } from "./stored/read-source.ts";
export { planUpload, type UploadOptions, type UploadPlan, upload, uploadFloats } from "./stored/upload.ts";
export { widen } from "./stored/widen.ts";
