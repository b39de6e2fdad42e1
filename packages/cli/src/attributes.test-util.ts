// A made-up regression whose tokens differ in difficulty: a token has some of eight attributes, and each adds a network of
// its own to the target. For tests of routers that give hard tokens more experts (2503.16057, 2601.15370).
import { add, type Engine, linear, mul, neg, random, square, sum, type Tensor, type Tree } from "@switchyard/core";
import {
  assignments,
  byGroup,
  expertsPerToken,
  ffn,
  layerInput,
  layerParams,
  moe,
  moeLayer,
  type RouterPlugin,
} from "@switchyard/core/moe";
import { adamw, type StepReport, type Task, trainer } from "@switchyard/core/train";

const [width, experts, teacherWidth] = [12, 8, 16];

export interface TokenBatch {
  readonly inputs: Float32Array;
  readonly targets: Float32Array;
  /** Attributes of each token. */
  readonly difficulty: Int32Array;
}

/** Draws of `tokens` tokens; `difficulties[n]` is the share of the tokens that have n attributes. */
export function attributes(
  on: Engine,
  { seed, difficulties }: { readonly seed: number; readonly difficulties: readonly number[] },
): (key: number | string, tokens: number) => TokenBatch {
  const draw = random(on, seed);
  const normal = (name: string, n: number, scale: number): Float64Array =>
    draw
      .at(name)
      .host("normal", n)
      .map((x) => x * scale);
  const centres = normal("centres", experts * width, 1);
  const plain = normal("plain", width, 1);
  const base = normal("base", width * width, 1 / Math.sqrt(width));
  const inner = normal("inner", experts * teacherWidth * width, 1 / Math.sqrt(width));
  const outer = normal("outer", experts * width * teacherWidth, Math.sqrt(2 / teacherWidth));
  const dot = (matrix: Float64Array, row: number, x: readonly number[]): number =>
    x.reduce((total, value, i) => total + value * (matrix[row * x.length + i] ?? 0), 0);

  return (key, tokens) => {
    const own = draw.at("batch", key);
    const chance = own.at("difficulty").host("uniform", tokens);
    const order = own.at("attributes").host("uniform", tokens * experts);
    const noise = own.at("noise").host("normal", tokens * width);
    const [inputs, targets] = [new Float32Array(tokens * width), new Float32Array(tokens * width)];
    const difficulty = new Int32Array(tokens);
    for (let t = 0; t < tokens; t++) {
      let [n, left] = [0, chance[t] ?? 0];
      while (n + 1 < difficulties.length && left >= (difficulties[n] ?? 0)) left -= difficulties[n++] ?? 0;
      difficulty[t] = n;
      const chosen = Array.from({ length: experts }, (_, a) => a)
        .sort((a, b) => (order[t * experts + a] ?? 0) - (order[t * experts + b] ?? 0))
        .slice(0, n);
      const centre = (d: number): number =>
        n === 0 ? (plain[d] ?? 0) : chosen.reduce((total, a) => total + (centres[a * width + d] ?? 0), 0);
      const x = Array.from({ length: width }, (_, d) => centre(d) + 0.5 * (noise[t * width + d] ?? 0));
      inputs.set(x, t * width);
      for (let d = 0; d < width; d++) targets[t * width + d] = dot(base, d, x);
      for (const a of chosen) {
        const hidden = Array.from({ length: teacherWidth }, (_, h) => Math.max(dot(inner, a * teacherWidth + h, x), 0));
        for (let d = 0; d < width; d++) {
          const at = t * width + d;
          targets[at] = (targets[at] ?? 0) + dot(outer, a * width + d, hidden);
        }
      }
    }
    return { inputs, targets, difficulty };
  };
}

export interface Outcome {
  /** Mean squared error on fresh tokens. */
  readonly error: number;
  /** Experts per token, in all and by difficulty. */
  readonly perToken: number;
  readonly byDifficulty: readonly number[];
  /** Each difficulty's part of all the experts' work. */
  readonly share: readonly number[];
  /** Of each expert, on fresh tokens. */
  readonly load: readonly number[];
  /** The training, step by step. */
  readonly history: readonly StepReport[];
}

/** Trains one layer, beside a linear map that serves every token, and looks at it in evaluation. */
export async function trainOn(
  on: Engine,
  plugin: RouterPlugin,
  options: {
    readonly seed: number;
    readonly difficulties: readonly number[];
    readonly steps: number;
    readonly fresh: number;
  },
): Promise<Outcome> {
  const { seed, difficulties, steps, fresh } = options;
  const batch = attributes(on, { seed, difficulties });
  const draws = random(on, 100 + seed);
  const made = ffn({ count: experts, width, hidden: 12, engine: on, random: draws });
  const layer = moeLayer(plugin, { engine: on, width, random: draws }, { experts: made });
  type Params = { readonly layer: Tree; readonly shared: Tensor };
  const run = (
    params: Params,
    { inputs, targets }: TokenBatch,
    { training, buffers }: { readonly training: boolean; readonly buffers: Tree },
  ) => {
    const shape = [inputs.length / width, width];
    const [hidden, target] = [on.tensor(inputs, shape), on.tensor(targets, shape)];
    const { output, routed } = moe(layer, params.layer, layerInput(layer, hidden, { training, buffers, target }));
    const miss = add(add(output, linear(hidden, params.shared)), neg(target));
    return { loss: mul(sum(square(miss)), 1 / miss.size), output, routed };
  };
  const task: Task<TokenBatch> = {
    params: { layer: layerParams(layer), shared: on.tensor(new Float32Array(width * width), [width, width]) },
    routers: [layer.router],
    batch: (index) => batch(index, 256),
    forward(params, [buffers = {}], data, { training }) {
      const { loss, output, routed } = run(params as Params, data, { training, buffers });
      return { loss, logits: output, layers: [routed] };
    },
    info: ({ difficulty }) => ({ tokens: difficulty.length }),
  };
  const rate = (step: number): number => (step < 0.8 * steps ? 1 : 0.1);
  const training = trainer(on, task, {
    optimiser: adamw({ learningRate: 4e-3, weightDecay: 0 }),
    schedule: rate,
    totalSteps: steps,
  });
  await training.run();
  const data = batch("fresh", fresh);
  const seen = on.scope(() => {
    const [buffers = {}] = training.buffers;
    const { loss, routed } = run(training.params as Params, data, { training: false, buffers });
    if (routed.plan.kind !== "sparse") throw new Error(`a plan of kind ${routed.plan.kind}`);
    const met = assignments(routed.plan, { tokens: fresh, experts });
    const perToken = expertsPerToken(met);
    const groups = on.tensor(data.difficulty, [fresh]);
    return { loss, load: sum(met, [0]), ...byGroup(perToken, groups, difficulties.length) };
  });
  const numbers = async (x: Tensor): Promise<number[]> => {
    const values = [...(await x.data())];
    x.dispose();
    return values;
  };
  const [error = Number.NaN] = await numbers(seen.loss);
  const load = await numbers(seen.load);
  const [byDifficulty, share] = [await numbers(seen.mean), await numbers(seen.share)];
  const { history } = training;
  training.dispose();
  return { history, error, perToken: load.reduce((total, n) => total + n, 0) / fresh, byDifficulty, share, load };
}
