// The public surface of @switchyard/models.
export { architecture, type DescribedArchitecture } from "./architectures/architecture.ts";
export { architectures } from "./architectures/families.ts";
export { olmoe, olmoeRefusal, type SpecialIds, writeOlmoe } from "./architectures/olmoe.ts";
export { type SwitchyardOptions, switchyard, writeSwitchyard } from "./architectures/switchyard.ts";
export type {
  Blueprint,
  DenseFeedForward,
  GateActivation,
  GroupedAttention,
  LatentAttention,
  LayerBlueprint,
  MixtureAttention,
  MoEFeedForward,
  Norm,
} from "./blueprint.ts";
export { TransformerCache } from "./cache.ts";
export {
  type ChatMessage,
  type ChatOptions,
  type ChatTemplate,
  type ChatTemplateFiles,
  chatTemplate,
  namedChatTemplates,
  readChatTemplate,
} from "./chat-template.ts";
export { type OpenCheckpoint, type OpenFile, openCheckpoint, type ReadOptions, readCheckpoint } from "./checkpoint.ts";
export type {
  CertifiedFile,
  CertifiedTensor,
  ConvertCertificate,
  TensorRange,
} from "./conversion/compare.ts";
export { type ConvertOptions, type ConvertProgress, type FloatType, floatTypes } from "./conversion/origin.ts";
export { convertCheckpoint } from "./convert.ts";
export { type BeamOptions, beam } from "./decoding/beam.ts";
export type { WeakRouting } from "./decoding/both-routings.ts";
export { type Contrasted, type ContrastOptions, contrast } from "./decoding/contrast.ts";
export { type ContrastiveOptions, contrastive } from "./decoding/contrastive.ts";
export { type ContrastiveSearchOptions, contrastiveSearch } from "./decoding/contrastive-search.ts";
export { type ContrastiveSearchCandidate, contrastiveSearchScore } from "./decoding/contrastive-search-score.ts";
export { type DoLaOptions, doLa } from "./decoding/do-la.ts";
export { type DynamicRoutingOptions, dynamicRouting } from "./decoding/dynamic-routing.ts";
export { type EnsembleRoutingOptions, ensembleRouting } from "./decoding/ensemble-routing.ts";
export { type GreedyOptions, greedy } from "./decoding/greedy.ts";
export { jensenShannon } from "./decoding/jensen-shannon.ts";
export { klDivergence } from "./decoding/kl-divergence.ts";
export { majorityVote, type Vote } from "./decoding/majority-vote.ts";
export type { SamplingOptions } from "./decoding/pick.ts";
export { type PrefixCache, type PrefixCacheOptions, prefixCache } from "./decoding/prefix-cache.ts";
export {
  type RoutingDivergence,
  type RoutingDivergenceOptions,
  routingDivergence,
} from "./decoding/routing-divergence.ts";
export { type SampleOptions, sample } from "./decoding/sample.ts";
export {
  type ConsistencyReport,
  type ConsistencySample,
  type SelfConsistencyOptions,
  selfConsistency,
} from "./decoding/self-consistency.ts";
export { type SelfContrastOptions, selfContrast } from "./decoding/self-contrast.ts";
export { type DecodingStrategyName, decodingStrategies } from "./decoding/strategies.ts";
export type {
  DecodedStep,
  DecodedToken,
  DecodingModel,
  DecodingOptions,
  DecodingRow,
  DecodingState,
  DecodingStrategy,
  SequenceNumbers,
  TokenProbability,
} from "./decoding/strategy.ts";
export { type UnchosenExperts, unchosenExperts } from "./decoding/unchosen-experts.ts";
export { unchosenRatio } from "./decoding/unchosen-ratio.ts";
export {
  type EvaluateOptions,
  type EvaluateProgress,
  type Evaluation,
  evaluateText,
  evaluateTokens,
} from "./evaluate.ts";
export {
  belady,
  type EvictionPolicy,
  type ExpertCache,
  type ExpertLoad,
  type ExpertPredictor,
  expertCache,
  expertPredictor,
  lfu,
  lru,
} from "./expert-cache.ts";
export {
  type FileToSave,
  fileSource,
  finishSave,
  type SaveOptions as SaveFilesOptions,
  saveFiles,
} from "./files.ts";
export {
  type BatchToken,
  type Ending,
  type GenerateBatchOptions,
  type GeneratedToken,
  type GenerateOptions,
  type GenerationOptions,
  generate,
  generateBatch,
  type Prompt,
} from "./generate.ts";
export {
  type CheckpointPart,
  type CheckpointSummary,
  type InspectOptions,
  inspectCheckpoint,
  type LayerGroup,
} from "./inspect.ts";
export { type MemoryOptions, type MemoryPlan, parseBytes, planMemory, showBytes, workingBytes } from "./memory.ts";
export type {
  Architecture,
  Checkpoint,
  ForwardOptions,
  KvCache,
  LanguageModel,
  Model,
  PassOptions,
  ReadModelOptions,
  RoutingPlace,
  RoutingTrace,
  Watch,
} from "./model.ts";
export { type ParameterCounts, parameterCounts } from "./parameter-counts.ts";
export {
  type LoadedModel,
  type LoadOptions,
  loadModel,
  type OpenOptions,
  readModel,
  type SaveOptions,
  saveModel,
} from "./pretrained.ts";
export {
  type DescribesCheckpoints,
  type RandomCheckpointOptions,
  randomCheckpoint,
  randomTensors,
} from "./random-checkpoint.ts";
export type { ReadPart } from "./read-parts.ts";
export { type RecordedTensor, recordedSources, recordLogits } from "./record-logits.ts";
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
export { type SaveCheckpointOptions, type SavedCheckpoint, saveCheckpoint } from "./save-checkpoint.ts";
export { readSnapshot, writeSnapshot } from "./snapshot-file.ts";
export type { CheckpointIndex, Description, Piece, Source } from "./source.ts";
export {
  blobSource,
  chosenFiles,
  type DirectoryHandle,
  directoryFiles,
  type HttpOptions,
  httpFiles,
  httpSource,
  type NamedFiles,
} from "./sources.ts";
export type { ExpertStore, StreamCounts, StreamPolicy } from "./streamed-experts.ts";
export { languageModelTask, randomWindows, type TextBatch } from "./task.ts";
export {
  type FoundTokenizer,
  readTokenizer,
  type StreamOptions,
  type Tokenizer,
  type TokenStream,
  tokenizer,
} from "./tokenizer.ts";
export {
  type TokenizerFiles,
  type TokenizerProgress,
  type TokenizerTrainingOptions,
  trainTokenizer,
} from "./tokenizer-training.ts";
export {
  type AnalyseOptions,
  analyseTrace,
  type LayerAnalysis,
  type TraceAnalysis,
  type TraceChunks,
  type TransitionAnalysis,
} from "./trace/analyse.ts";
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
export { diffTraces, type LayerDifference, type RoutingDifference, type TraceDifference } from "./trace/diff.ts";
export type { TraceChunk, TraceChunkLayer, TraceHeader, TraceLayer } from "./trace/format.ts";
export { readTrace, type Trace, type TraceEnd, type TracePlace } from "./trace/reader.ts";
export {
  type TracePass,
  type TracePassInput,
  type TraceRecorder,
  type TraceRecorderOptions,
  traceRecorder,
} from "./trace/recorder.ts";
export {
  type TraceStretch,
  type TraceTokens,
  type TraceTokensOptions,
  traceTexts,
  traceTokens,
} from "./trace/tokens.ts";
export { traced } from "./trace/traced.ts";
export { appendTrace, type TraceSink, type TraceWriter, traceFile, traceWriter } from "./trace/writer.ts";
export { asTransformer, type Transformer, type TransformerArchitecture, transformer } from "./transformer.ts";
export { type CompleteConfig, completeConfig, parameterShapes, type TransformerConfig } from "./transformer-config.ts";
export type { CheckpointContent } from "./weights.ts";
