// The public surface of @switchyard/models.
export { olmoe, olmoeRefusal, type SpecialIds, writeOlmoe } from "./architectures/olmoe.ts";
export { type SwitchyardOptions, switchyard, writeSwitchyard } from "./architectures/switchyard.ts";
export { TransformerCache } from "./cache.ts";
export { type OpenCheckpoint, type OpenFile, openCheckpoint, readCheckpoint } from "./checkpoint.ts";
export { type FileToSave, fileSource, type SaveOptions as SaveFilesOptions, saveFiles } from "./files.ts";
export { type GeneratedToken, type GenerateOptions, generate } from "./generate.ts";
export type { Architecture, Checkpoint, ForwardOptions, KvCache, Model, RoutingTrace } from "./model.ts";
export { type ParameterCounts, parameterCounts } from "./parameter-counts.ts";
export { type LoadedModel, type LoadOptions, loadModel, type SaveOptions, saveModel } from "./pretrained.ts";
export {
  type ByteSource,
  bytesSource,
  encodeSafetensors,
  readHeader,
  type Safetensors,
  type StoredTensor,
  type TensorSource,
  toFloat32,
} from "./safetensors.ts";
export { readSnapshot, writeSnapshot } from "./snapshot-file.ts";
export { languageModelTask, randomWindows, type TextBatch } from "./task.ts";
export { type Tokenizer, tokenizer } from "./tokenizer.ts";
export {
  type TokenizerFiles,
  type TokenizerProgress,
  type TokenizerTrainingOptions,
  trainTokenizer,
} from "./tokenizer-training.ts";
export { type Transformer, type TransformerArchitecture, type TransformerOptions, transformer } from "./transformer.ts";
export { type CompleteConfig, completeConfig, parameterShapes, type TransformerConfig } from "./transformer-config.ts";
export type { CheckpointContent } from "./weights.ts";
