// The public surface of @switchyard/models.
export { olmoe, olmoeRefusal, type SpecialIds, writeOlmoe } from "./architectures/olmoe.ts";
export { type SwitchyardOptions, switchyard, writeSwitchyard } from "./architectures/switchyard.ts";
export { TransformerCache } from "./cache.ts";
export { type OpenCheckpoint, type OpenFile, openCheckpoint, type ReadOptions, readCheckpoint } from "./checkpoint.ts";
export { type Contrasted, type ContrastOptions, contrast } from "./decoding/contrast.ts";
export { type ContrastiveSearchCandidate, contrastiveSearchScore } from "./decoding/contrastive-search-score.ts";
export { jensenShannon } from "./decoding/jensen-shannon.ts";
export { klDivergence } from "./decoding/kl-divergence.ts";
export { majorityVote, type Vote } from "./decoding/majority-vote.ts";
export { unchosenRatio } from "./decoding/unchosen-ratio.ts";
export {
  type FileToSave,
  fileSource,
  finishSave,
  type SaveOptions as SaveFilesOptions,
  saveFiles,
} from "./files.ts";
export { type GeneratedToken, type GenerateOptions, generate } from "./generate.ts";
export type { Architecture, Checkpoint, ForwardOptions, KvCache, Model, RoutingTrace } from "./model.ts";
export { type ParameterCounts, parameterCounts } from "./parameter-counts.ts";
export { type LoadedModel, type LoadOptions, loadModel, type SaveOptions, saveModel } from "./pretrained.ts";
export { type RopeFrequencies, type Rotary, type RotaryOptions, ropeTables, rotary } from "./rope.ts";
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
export {
  type CacheCounts,
  type CachePolicy,
  type CacheResult,
  type CacheSize,
  cachePolicies,
  type ExpertRequest,
  expertRequests,
  simulateCache,
} from "./trace/cache-sim.ts";
export type { TraceChunk, TraceChunkLayer, TraceHeader, TraceLayer } from "./trace/format.ts";
export { readTrace, type Trace, type TraceEnd, type TracePlace } from "./trace/reader.ts";
export {
  type TracePass,
  type TracePassInput,
  type TraceRecorder,
  type TraceRecorderOptions,
  traceRecorder,
} from "./trace/recorder.ts";
export { appendTrace, type TraceSink, type TraceWriter, traceFile, traceWriter } from "./trace/writer.ts";
export { type Transformer, type TransformerArchitecture, type TransformerOptions, transformer } from "./transformer.ts";
export { type CompleteConfig, completeConfig, parameterShapes, type TransformerConfig } from "./transformer-config.ts";
export type { CheckpointContent } from "./weights.ts";
