// The public surface of @switchyard/bench.
export {
  countedBytes,
  countedTokens,
  heldOutWindows,
  inBatches,
  type TokenBatch,
  type TrainingOrder,
  tokenStream,
  trainingBatches,
} from "./batches.ts";
export { checkpointSteps, compareRouters, modelFolder } from "./compare.ts";
export {
  byteLength,
  type Corpus,
  type CorpusOptions,
  type Domain,
  distinctNames,
  readCorpus,
  type SplitOptions,
  splitCorpora,
} from "./corpus.ts";
export {
  type Codec,
  type Comparison,
  type ComparisonOptions,
  type Contender,
  domainRecords,
  type LayerDecisions,
  type Prepared,
  type ProbeRouting,
  type Progress,
  prepare,
  type SnapshotFiles,
  type Subject,
  type TraceFiles,
  type TrainingSettings,
} from "./experiment.ts";
export {
  type Choices,
  chosenProbabilities,
  deadExperts,
  expertLoad,
  expertsPerToken,
  type Interval,
  interval,
  knownWords,
  loadByLabel,
  loadImbalance,
  routingEntropy,
  routingFluctuation,
  specialisation,
  specialisationOfLoad,
  words,
} from "./metrics.ts";
export { type ByteModel, byteModel, byteModelBits, byteProbability } from "./ngram.ts";
export { finding, renderReport } from "./report.ts";
export {
  type Baseline,
  type CheckpointRecord,
  type DomainRecord,
  type LayerRouting,
  type OverSeeds,
  parseJson,
  parseResults,
  type Results,
  type RunResult,
  resultsSchema,
  type Sample,
  type SampleToken,
  type SummaryRow,
} from "./results.ts";
export { type Extras, extrasOf, measureSpeed, type Speed, stepsThatFit } from "./speed.ts";
export { readText, writableFolder, writeWhole } from "./store.ts";
export { type Column, columns, overSeedsText, shortCount, summarise, tableText } from "./summary.ts";
export {
  type ReportAnalysis,
  type ReportLayer,
  type ReportTokens,
  type TraceReport,
  traceFindings,
  traceReport,
  troubledExperts,
} from "./trace-report.ts";
