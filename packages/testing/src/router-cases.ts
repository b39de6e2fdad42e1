// What every router owes to the layer around it, as data: cases that throw. testRouter runs them in vitest.
import { dispose, type Engine, engine as engineOf, leaves, mapTree, random, type Tree } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { glu, moe, pluginFault, type Router, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { assertClose, generator, type HostArray, ints, type Tolerance, uniform } from "./arrays.ts";
import { download } from "./cases/case.ts";
import * as oracle from "./oracles.ts";
import {
  type Answer,
  answerOf,
  array,
  assignments,
  checkForm,
  kindOf,
  obeys,
  permuted,
  read,
  readTree,
  sameBits,
  samePlanAndLosses,
  type WeightRule,
  weightRows,
} from "./router-answer.ts";
import { checkGradients } from "./router-gradients.ts";
import { type RouterCall, routerContext, routerInput } from "./router-input.ts";

/** Sizes a router is tested with. All distinct and none a multiple of another, so that mixed-up axes show. */
export interface RouterSizes {
  readonly experts: number;
  readonly width: number;
  readonly batch: number;
  readonly sequence: number;
}

export interface RouterSuite {
  /**
   * The router. As a function it also gets the cases with one expert and with k = all experts: `k` is absent where the
   * router's own choice is meant.
   */
  readonly plugin: RouterPlugin | ((sizes: { readonly experts: number; readonly k?: number }) => RouterPlugin);
  /** What the documentation promises about weights in evaluation. Tokens without an expert are not asked. */
  readonly weights: WeightRule;
  /** Default: 5 experts, width 6, 2 rows of 7 tokens. */
  readonly sizes?: Partial<RouterSizes>;
  /** More input than the suite makes up by itself (target, schedule, globalLoad, ...). */
  input?(base: RouterInput): Partial<RouterInput>;
  /** Default: the reference backend with float64 storage. */
  engine?(): Engine;
  /** For comparisons that need not be bit for bit; defaults 1e-10 and 1e-9. */
  readonly tolerance?: Partial<Tolerance>;
}

/** One check of a router. `run` rejects with the reason when the router breaks it. */
export interface RouterCase {
  readonly name: string;
  /** Why the case does not concern this router at all; such a case is not run. */
  readonly reason?: string;
  run(): Promise<void>;
}

/** A router made for one case. */
interface Subject {
  readonly engine: Engine;
  readonly experts: number;
  readonly plugin: RouterPlugin;
  readonly router: Router;
}
type Call = Omit<RouterCall, "hidden" | "experts"> & { readonly hidden: HostArray };

/** What all cases share. */
interface Kit {
  readonly suite: RouterSuite;
  readonly sizes: RouterSizes;
  readonly tokens: number;
  readonly tolerance: Tolerance;
  /** The plugin of the usual size, and a router of it whose tensors are gone. */
  readonly sample: { readonly plugin: RouterPlugin; readonly router: Router };
  /** A case that gets a fresh router; everything is freed after it, and nothing else may be left. */
  make(
    name: string,
    body: (subject: Subject) => Promise<void>,
    more?: { readonly reason?: string | undefined; readonly experts?: number; readonly k?: number },
  ): RouterCase;
  input(subject: Subject, call: Call): RouterInput;
  route(subject: Subject, call: Call): Promise<Answer>;
  hidden(key: string, rows?: number): HostArray;
  /** Throws unless the answer of `rows` tokens is well formed. */
  check(subject: Subject, answer: Answer, rows?: number): void;
}

const modes = [
  ["training", true],
  ["evaluation", false],
] as const;

/** The cases of one router, with the reason where one does not apply. */
export function routerCases(suite: RouterSuite): readonly RouterCase[] {
  const kit = makeKit(suite);
  return [
    ...formCases(kit),
    ...giftCases(kit),
    overrideCase(kit),
    ...determinismCases(kit),
    ...symmetryCases(kit),
    ...sampleCases(kit),
    ...paddingCases(kit),
    ...causalityCases(kit),
    ...learningCases(kit),
    ...checkpointCases(kit),
    ...edgeCases(kit),
  ];
}

function makeKit(suite: RouterSuite): Kit {
  const sizes = { experts: 5, width: 6, batch: 2, sequence: 7, ...suite.sizes };
  const tokens = sizes.batch * sizes.sequence;
  const start = (): Engine => suite.engine?.() ?? engineOf(cpu({ precision: 64 }));
  const pluginOf = (experts: number, k?: number): RouterPlugin =>
    typeof suite.plugin === "function" ? suite.plugin({ experts, ...(k === undefined ? {} : { k }) }) : suite.plugin;
  const init = (engine: Engine, plugin: RouterPlugin, experts: number): Router =>
    plugin.init(routerContext(engine, { experts, width: sizes.width }));
  const plugin = pluginOf(sizes.experts);
  const router = init(start(), plugin, sizes.experts);
  dispose([router.params, router.buffers]);

  const kit: Kit = {
    suite,
    sizes,
    tokens,
    tolerance: { absolute: 1e-10, relative: 1e-9, ...suite.tolerance },
    sample: { plugin, router },
    make(name, body, { reason, experts = sizes.experts, k } = {}) {
      const run = async (): Promise<void> => {
        const engine = start();
        const before = engine.live();
        const own = pluginOf(experts, k);
        const made = init(engine, own, experts);
        await body({ engine, experts, plugin: own, router: made });
        dispose([made.params, made.buffers]);
        const left = engine.live() - before;
        if (left !== 0)
          throw new Error(
            `${left} handles were left alive: free what init, route or afterStep made beside its results`,
          );
      };
      return { name, run, ...(reason === undefined ? {} : { reason }) };
    },
    input({ engine, experts, router: { buffers } }, call) {
      const base = routerInput(engine, { batch: sizes.batch, buffers, experts, ...call });
      return { ...base, ...suite.input?.(base) };
    },
    route(subject, call) {
      const { engine, router: own } = subject;
      return read(engine.scope(() => answerOf(own.route(own.params, kit.input(subject, call)))));
    },
    hidden: (key, rows = tokens) => uniform(generator(`router hidden ${key}`), [rows, sizes.width], -1.5, 1.5),
    check: ({ experts, plugin: { plans } }, answer, rows = tokens) =>
      checkForm(answer, { experts, tokens: rows, plans }),
  };
  return kit;
}

// ---------------------------------------------------------------- overrides
/** The last row asks for its second expert without expert 0; rows without an override keep all they had. */
function overrideCase({ sizes, sample, make, input, hidden, check }: Kit): RouterCase {
  const { batch, sequence } = sizes;
  const body = async (subject: Subject): Promise<void> => {
    const { engine, router, experts } = subject;
    const decide = (override: RouterInput["override"]): Promise<Answer> =>
      read(
        engine.scope(() => {
          const given = input(subject, { hidden: hidden("overrides") });
          return answerOf(router.route(router.params, { ...given, ...(override ? { override } : {}) }));
        }),
      );
    const others = new Array<undefined>(batch - 1).fill(undefined);
    const [own, mixed] = [await decide(undefined), await decide([...others, { ranks: [1], masked: [0] }])];
    check(subject, mixed);
    const ids = (answer: Answer): number[][] => {
      const { shape, data } = array(answer, "plan sparse experts");
      const slots = shape[1] ?? 0;
      return Array.from({ length: batch * sequence }, (_, t) => [...data.subarray(t * slots, (t + 1) * slots)]);
    };
    const chosen = (row: readonly number[]): number[] => row.filter((id) => id >= 0);
    const [before, after] = [ids(own).map(chosen), ids(mixed).map(chosen)];
    const weights = [weightRows(own), weightRows(mixed)] as const;
    // A capacity makes rows compete, so that what one asks for is another's loss.
    const capped = mixed.has("metric dropped");
    for (const [t, row] of after.entries()) {
      if (t >= (batch - 1) * sequence) {
        if (row.length > 1 || (row.length === 0 && !capped) || row.includes(0))
          throw new Error(`token ${t} asked for rank 1 without expert 0, and got [${row.join(", ")}] of ${experts}`);
      } else if (!capped && (row.join() !== before[t]?.join() || weights[0][t]?.join() !== weights[1][t]?.join())) {
        throw new Error(`token ${t} has no override, and its experts changed from [${before[t]}] to [${row}]`);
      }
    }
  };
  const reason = sample.router.overrides ? undefined : "it takes no routing overrides (Router.overrides)";
  return make("routing overrides are obeyed, row by row", body, { reason });
}

// ---------------------------------------------------------------- form
function formCases({ suite, sizes, tokens, tolerance, make, route, input, hidden, check }: Kit): RouterCase[] {
  return [
    ...modes.map(([mode, training]) =>
      make(`${mode}: plan, losses and probabilities are well formed`, async (subject) => {
        check(subject, await route(subject, { training, hidden: hidden("form") }));
      }),
    ),
    make("weights obey the documented rule", async (subject) => {
      const answer = await route(subject, { hidden: hidden("weights") });
      for (const [i, row] of weightRows(answer).entries()) {
        if (row.length === 0 || obeys(suite.weights, row)) continue;
        const asked = typeof suite.weights === "string" ? suite.weights : "obey the rule of the suite";
        throw new Error(`weights [${row.join(", ")}] of row ${i} do not ${asked}`);
      }
    }),
    make("the plugin describes itself", async ({ plugin }) => {
      const fault = pluginFault(plugin);
      if (fault !== undefined) throw new Error(fault);
      const { options } = plugin;
      if (options && JSON.stringify(JSON.parse(JSON.stringify(options))) !== JSON.stringify(options))
        throw new Error("plugin.options does not survive JSON");
    }),
    make("a layer with this router adds up its experts", async (subject) => {
      const { engine, router, experts: count } = subject;
      const hiddens = hidden("layer");
      const inner = 3;
      const made = glu({ count, width: sizes.width, hidden: inner, engine, random: random(engine, 7) });
      const { output, answer } = engine.scope(() => {
        const tree = { router: router.params, experts: made.params };
        const result = moe({ router, experts: made }, tree, input(subject, { hidden: hiddens }));
        return { output: result.output, answer: answerOf(result.routed) };
      });
      const [found, routed] = [await download(output), await read(answer)];
      const weights = await readTree(made.params, "");
      dispose([output, made.params]);
      if (!found.data.every(Number.isFinite)) throw new Error("the layer's output is not finite");
      const kind = kindOf(routed);
      const single = kind === "sparse" || kind === "dense" || kind === "expert-choice";
      if (!single || [...routed.keys()].some((name) => name === "rows" || name.startsWith("more "))) return;
      const matrix = assignments(routed, tokens, count);
      const all = ints(
        [tokens, count],
        Int32Array.from({ length: tokens * count }, (_, i) => i % count),
      );
      const expected = oracle.moeExperts(hiddens, array(weights, ".gateUp"), array(weights, ".down"), all, matrix);
      assertClose("output", found, expected, tolerance);
    }),
  ];
}

// ---------------------------------------------------------------- what wrappers build on
function giftCases({ sizes, sample, make, route, hidden }: Kit): RouterCase[] {
  const { gives } = sample.plugin;
  return [
    make(
      "what wrappers build on is there",
      async (subject) => {
        const { plugin, router } = subject;
        const declared = new Set(plugin.gives);
        const halves = router.score !== undefined && router.select !== undefined;
        if (declared.has("scores") !== halves)
          throw new Error(
            halves
              ? 'the router has score and select, so gives must list "scores"'
              : 'gives lists "scores", and the router lacks score or select',
          );
        for (const [mode, training] of modes) {
          const answer = await route(subject, { training, hidden: hidden("gifts") });
          for (const name of ["logits", "probabilities"] as const)
            if (declared.has(name) && !answer.has(name))
              throw new Error(`gives lists "${name}", and there are none in ${mode}`);
          if (declared.has("probabilities")) {
            const { shape, data } = array(answer, "probabilities");
            const columns = shape[1] ?? 0;
            for (let i = 0; i < data.length; i += columns) {
              const row = [...data.subarray(i, i + columns)];
              if (!obeys("sum to 1", row))
                throw new Error(`${mode}: probabilities [${row.join(", ")}] of token ${i / columns} do not sum to 1`);
            }
          }
          if (declared.has("choices")) await checkChoices(subject, mode, training);
          for (const loss of ["balance", "zLoss"] as const) {
            const weight = plugin.options?.[loss];
            if (answer.has(`loss ${loss}`) && !(typeof weight === "number" && weight > 0) && !wrapped(plugin))
              throw new Error(`there is a loss "${loss}", so options.${loss} must be its weight; found ${weight}`);
          }
        }
      },
      { reason: gives ? undefined : "the plugin declares nothing that wrappers may build on (RouterPlugin.gives)" },
    ),
  ];

  /** What a token chose does not depend on other sequences. */
  async function checkChoices(subject: Subject, mode: string, training: boolean): Promise<void> {
    const call = { training, hidden: hidden("gifts") };
    const idsOf = async (own: Call): Promise<HostArray> => {
      const answer = await route(subject, own);
      if (kindOf(answer) !== "sparse")
        throw new Error(`${mode}: gives lists "choices", and the plan is "${kindOf(answer)}", not "sparse"`);
      return array(answer, "plan sparse experts");
    };
    const first = await idsOf(call);
    const k = first.shape[1] ?? 0;
    for (let row = 0; row < sizes.batch; row++) {
      const inRow = (token: number): boolean => Math.floor(token / sizes.sequence) === row;
      const second = await idsOf({ ...call, hidden: repainted(call.hidden, inRow) });
      const i = first.data.findIndex((id, slot) => !inRow(Math.floor(slot / k)) && id !== second.data[slot]);
      if (i >= 0)
        throw new Error(
          `${mode}: gives lists "choices", but another sequence in row ${row} changed an expert of token ` +
            `${Math.floor(i / k)} from ${first.data[i]} to ${second.data[i]}`,
        );
    }
  }
}

/** Whether the options are those of a wrapper: the losses may then be of the router inside. */
const wrapped = ({ options }: RouterPlugin): boolean => typeof options?.router === "object";

// ---------------------------------------------------------------- determinism
function determinismCases({ sample, make, route, input, hidden }: Kit): RouterCase[] {
  const state = async ({ router }: Subject): Promise<Answer> =>
    new Map([...(await readTree(router.params, "params")), ...(await readTree(router.buffers, "buffers"))]);
  const halves = sample.router.score && sample.router.select;
  return [
    make("the same seed gives the same parameters and the same answer", async (subject) => {
      const once = async (own: Subject): Promise<Answer> =>
        new Map([...(await state(own)), ...(await route(own, { training: true, seed: 3, hidden: hidden("seed") }))]);
      const first = await once(subject);
      const again = subject.plugin.init(
        routerContext(subject.engine, { experts: subject.experts, width: hidden("seed").shape[1] ?? 0 }),
      );
      const second = await once({ ...subject, router: again });
      dispose([again.params, again.buffers]);
      sameBits(first, second, "second router");
    }),
    make("evaluation does not depend on seed or step", async (subject) => {
      const call = { hidden: hidden("evaluation") };
      const one = await route(subject, { ...call, seed: 3, step: 5 });
      sameBits(one, await route(subject, { ...call, seed: 4, step: 6 }), "other seed and step");
    }),
    make("route leaves parameters and buffers as they were", async (subject) => {
      const before = await state(subject);
      await route(subject, { training: true, hidden: hidden("state") });
      sameBits(before, await state(subject), "after route");
    }),
    make(
      "score, then select, is route",
      async (subject) => {
        const { engine, router } = subject;
        for (const [mode, training] of modes) {
          const call: Call = { training, seed: 3, hidden: hidden("halves") };
          const whole = await route(subject, call);
          const composed = engine.scope(() => {
            const given = input(subject, call);
            if (!router.score || !router.select)
              throw new Error("the first router had score and select, this one has not");
            return answerOf(router.select(router.score(router.params, given), given));
          });
          sameBits(whole, await read(composed), `${mode}: select(score)`);
        }
      },
      { reason: halves ? undefined : "the router does not tell score and select apart" },
    ),
  ];
}

// ---------------------------------------------------------------- symmetry
function symmetryCases({ sizes, tokens, tolerance, make, route, input, hidden }: Kit): RouterCase[] {
  return [
    make("permuting the experts permutes the answer", async (subject) => {
      const { engine, router } = subject;
      const n = sizes.experts;
      // A cyclic shift by two: expert e is called order[e] afterwards.
      const order = Array.from({ length: n }, (_, e) => (e + 2) % n);
      const call = { hidden: hidden("permute") };
      const plain = await route(subject, call);
      // Null experts stand behind the real ones and stay; a size that is also the width says nothing about experts.
      const all = loads(plain, n);
      const longer = Array.from({ length: all }, (_, e) => order[e] ?? e);
      const permute = async (tree: Tree): Promise<Tree> => {
        const found = await readTree(tree, "");
        return mapTree(tree, (_, path) => {
          const moved = permuted(array(found, `.${path}`), n, order);
          const x = all > n && all !== sizes.width ? permuted(moved, all, longer) : moved;
          return engine.tensor(x.data, x.shape);
        });
      };
      const [params, buffers] = [await permute(router.params), await permute(router.buffers)];
      const moved = engine.scope(() => answerOf(router.route(params, input(subject, { ...call, buffers }))));
      const answer = await read(moved);
      dispose([params, buffers]);
      const [before, after] = [assignments(plain, tokens, n), assignments(answer, tokens, n)];
      // [tokens, experts * columns of each]: only the experts move.
      const own = (before.shape[1] ?? 0) / n;
      const split = { shape: [tokens, n, own], data: before.data };
      const expected = permuted(split, n, order, 1);
      assertClose("weights after the permutation", after, { shape: before.shape, data: expected.data }, tolerance);
      sameLosses(plain, answer, tolerance);
    }),
  ];
}

// ---------------------------------------------------------------- samples
function sampleCases({ sizes, tokens, sample, make, route, hidden }: Kit): RouterCase[] {
  return modes.map(([mode, training]) =>
    make(
      `${mode}: all tokens of a sample go to the same experts`,
      async (subject) => {
        const met = assignments(
          await route(subject, { training, hidden: hidden("samples") }),
          tokens,
          sizes.experts,
          true,
        );
        const columns = met.shape[1] ?? 0;
        for (let token = 0; token < tokens; token++) {
          const first = token - (token % sizes.sequence);
          for (let i = 0; i < columns; i++) {
            if (met.data[token * columns + i] !== met.data[first * columns + i])
              throw new Error(
                `token ${token - first} of row ${first / sizes.sequence} and the first one of it meet other experts, ` +
                  "and the plugin declares perSample",
              );
          }
        }
      },
      { reason: sample.plugin.perSample ? undefined : "the plugin does not declare perSample" },
    ),
  );
}

function sameLosses(expected: Answer, found: Answer, tolerance: Tolerance): void {
  for (const [name, value] of expected)
    if (name.startsWith("loss ")) assertClose(name, array(found, name), value, tolerance);
}

/** x with the rows of some tokens replaced. */
function repainted(x: HostArray, where: (token: number) => boolean): HostArray {
  const width = x.shape[1] ?? 1;
  const other = uniform(generator("repainted"), x.shape, -3, 3);
  const data = Float64Array.from(x.data, (value, i) => (where(Math.floor(i / width)) ? (other.data[i] ?? 0) : value));
  return { shape: x.shape, data };
}

// ---------------------------------------------------------------- padding
function paddingCases({ suite, sizes, tokens, tolerance, make, sample, route, hidden, check }: Kit): RouterCase[] {
  // The first row starts with padding, the others end with it.
  const mask = Array.from({ length: tokens }, (_, i) => {
    const [row, position] = [Math.floor(i / sizes.sequence), i % sizes.sequence];
    return row === 0 ? Number(position >= 1) : Number(position < sizes.sequence - 2);
  });
  const untouched = (answer: Answer, real: readonly number[]): void => {
    const met = assignments(answer, tokens, sizes.experts, true);
    const columns = met.shape[1] ?? 0;
    real.forEach((one, token) => {
      const row = met.data.subarray(token * columns, (token + 1) * columns);
      if (one === 0 && row.some((value) => value !== 0))
        throw new Error(`padded token ${token} was sent to experts: [${row.join(", ")}]`);
    });
  };
  return [
    ...modes.flatMap(([mode, training]) => [
      make(`${mode}: padding gets no expert and no weight`, async (subject) => {
        const answer = await route(subject, { training, hidden: hidden("padding"), mask });
        check(subject, answer);
        untouched(answer, mask);
      }),
      make(`${mode}: what stands in padding changes nothing`, async (subject) => {
        const call = { training, hidden: hidden("padding"), mask };
        const first = await route(subject, call);
        const second = await route(subject, { ...call, hidden: repainted(call.hidden, (token) => mask[token] === 0) });
        samePlanAndLosses(first, second, "other values in padding");
      }),
      make(`${mode}: a mask without padding changes nothing`, async (subject) => {
        const call = { training, hidden: hidden("padding") };
        const first = await route(subject, call);
        samePlanAndLosses(first, await route(subject, { ...call, mask: mask.map(() => 1) }), "a mask of ones");
      }),
    ]),
    make("a padded sequence equals the sequence alone", async (subject) => {
      const padding = 2;
      const real = sizes.sequence - padding;
      const long = hidden("alone", sizes.sequence);
      // At the left only where nothing else belongs to the positions: ids and attention of the two calls would differ.
      const sides = sample.plugin.needs.length === 0 && !suite.input ? [0, padding] : [0];
      for (const from of sides)
        for (const training of from === 0 ? [false, true] : [false]) {
          const [first, end] = [from * sizes.width, (from + real) * sizes.width];
          const short = { shape: [real, sizes.width], data: long.data.slice(first, end) };
          const ones = Array.from({ length: sizes.sequence }, (_, i) => Number(i >= from && i < from + real));
          const padded = await route(subject, { training, batch: 1, hidden: long, mask: ones });
          const alone = await route(subject, { training, batch: 1, hidden: short });
          sameLosses(alone, padded, tolerance);
          // Random draws and capacities of a longer batch are others, so plans are compared in evaluation only;
          // draws of moved tokens are others too.
          if (training) continue;
          const [a, b] = [assignments(padded, sizes.sequence, sizes.experts), assignments(alone, real, sizes.experts)];
          const columns = b.shape[1] ?? 0;
          assertClose(
            `weights of the real tokens, padding at the ${from === 0 ? "right" : "left"}`,
            { shape: b.shape, data: a.data.slice(from * columns, from * columns + b.data.length) },
            b,
            tolerance,
          );
        }
    }),
    make("nothing but padding", async (subject) => {
      for (const [, training] of modes) {
        const answer = await route(subject, { training, hidden: hidden("empty"), mask: mask.map(() => 0) });
        check(subject, answer);
        untouched(
          answer,
          mask.map(() => 0),
        );
      }
    }),
  ];
}

// ---------------------------------------------------------------- causality
function causalityCases({ sizes, tokens, tolerance, sample, make, route, input, hidden }: Kit): RouterCase[] {
  const { causal } = sample.plugin;
  const ahead = modes.map(([mode, training]) =>
    make(
      `${mode}: never looks ahead`,
      async (subject) => {
        const call = { training, hidden: hidden("causal") };
        const look = async (own: Call): Promise<readonly [HostArray, HostArray]> => {
          const answer = await route(subject, own);
          return [assignments(answer, tokens, sizes.experts), assignments(answer, tokens, sizes.experts, true)];
        };
        const [first, met] = await look(call);
        const columns = first.shape[1] ?? 0;
        for (let row = 0; row < sizes.batch; row++)
          for (let t = 0; t + 1 < sizes.sequence; t++) {
            const [start, from, end] = [row * sizes.sequence, row * sizes.sequence + t + 1, (row + 1) * sizes.sequence];
            const changed = repainted(call.hidden, (token) => token >= from && token < end);
            const [second, meets] = await look({ ...call, hidden: changed });
            const what = `changing tokens from ${t + 1} on in row ${row} changed`;
            for (let i = start * columns; i < from * columns; i++) {
              const token = Math.floor(i / columns) - start;
              if (!Object.is(first.data[i], second.data[i]))
                throw new Error(`${what} the weight of token ${token}: ${first.data[i]} became ${second.data[i]}`);
              if ((met.data[i] !== 0) !== (meets.data[i] !== 0))
                throw new Error(`${what} whether token ${token} meets an expert`);
            }
          }
      },
      { reason: causal[mode] ? undefined : `the plugin declares that it is not causal in ${mode}` },
    ),
  );
  const decoding = make(
    "decoding token by token equals the whole sequence",
    async (subject) => {
      const { engine, router } = subject;
      const all = hidden("decode");
      const whole = assignments(await route(subject, { hidden: all }), tokens, sizes.experts);
      let cache: Tree | undefined;
      for (let t = 0; t < sizes.sequence; t++) {
        const pick = (x: HostArray, width: number): HostArray => {
          const rows = Array.from({ length: sizes.batch }, (_, row) => row * sizes.sequence + t);
          const data = rows.flatMap((token) => [...x.data.subarray(token * width, (token + 1) * width)]);
          return { shape: [sizes.batch, width], data: Float64Array.from(data) };
        };
        const call = { past: t, hidden: pick(all, sizes.width), ...(cache === undefined ? {} : { cache }) };
        const step = engine.scope(() => {
          const routed = router.route(router.params, input(subject, call));
          return { answer: answerOf(routed), cache: routed.cache };
        });
        if (cache !== undefined && cache !== step.cache) dispose(cache);
        cache = step.cache;
        const found = assignments(await read(step.answer), sizes.batch, sizes.experts);
        assertClose(`weights at position ${t}`, found, pick(whole, whole.shape[1] ?? 0), tolerance);
      }
      if (cache !== undefined) dispose(cache);
    },
    { reason: causal.evaluation ? undefined : "the plugin declares that it is not causal in evaluation" },
  );
  return [...ahead, decoding];
}

const metricsOf = (answer: Answer): Readonly<Record<string, Float64Array>> =>
  Object.fromEntries(
    [...answer].flatMap(([name, x]) =>
      name.startsWith("metric ") ? [[name.slice(7), Float64Array.from(x.data)]] : [],
    ),
  );
/** Real and null experts: how many loads `afterStep` is told. */
const loads = (answer: Answer, experts: number): number =>
  Math.max((answer.get("probabilities") ?? answer.get("logits"))?.shape[1] ?? 0, experts);

// ---------------------------------------------------------------- learning
function learningCases({ sizes, tokens, sample, make, route, input, hidden, check }: Kit): RouterCase[] {
  return [
    make("gradients of weights and losses agree with central differences", (subject) =>
      checkGradients(subject.engine, subject.router, {
        hidden: hidden("gradient"),
        inputOf: (x) => input(subject, { training: true, hidden: x }),
      }),
    ),
    make(
      "buffers survive a step",
      async (subject) => {
        const { engine, router } = subject;
        const answer = await route(subject, { training: true, hidden: hidden("step") });
        const met = assignments(answer, tokens, sizes.experts, true);
        const own = (met.shape[1] ?? 0) / sizes.experts;
        const load = new Float64Array(loads(answer, sizes.experts));
        met.data.forEach((value, i) => {
          const e = Math.floor(i / own) % sizes.experts;
          load[e] = (load[e] ?? 0) + Number(value !== 0);
        });
        const metrics = metricsOf(answer);
        const old = await readTree(router.buffers, "buffers");
        const checkBuffers = (fresh: Answer, when: string): void => {
          if ([...old.keys()].join() !== [...fresh.keys()].join())
            throw new Error(
              `${when}: buffers ${[...fresh.keys()].join(", ")}, the router has ${[...old.keys()].join(", ")}`,
            );
          for (const [name, x] of fresh) {
            const shape = old.get(name)?.shape ?? [];
            if (x.shape.join() !== shape.join())
              throw new Error(
                `${when}: ${name} changed its shape from [${shape.join(", ")}] to [${x.shape.join(", ")}]`,
              );
            if (!x.data.every(Number.isFinite)) throw new Error(`${when}: ${name} is [${x.data.join(", ")}]`);
          }
        };
        const after = (layer: { tokens: number; load: Float64Array }): Tree =>
          engine.scope(() => {
            if (!router.afterStep) throw new Error("the first router had afterStep, this one has not");
            const statistics = { step: 0, totalSteps: 10, metrics, ...layer };
            return router.afterStep([statistics, { ...statistics }], router.buffers);
          });
        const free = (tree: Tree): void => {
          const kept = new Set(leaves(router.buffers).map(([, x]) => x));
          for (const [, x] of leaves(tree)) if (!kept.has(x)) x.dispose();
        };
        const next = after({ tokens, load });
        checkBuffers(await readTree(next, "buffers"), "after a step");
        check(subject, await route(subject, { training: true, step: 1, hidden: hidden("step"), buffers: next }));
        free(next);
        const idle = after({ tokens: 0, load: new Float64Array(load.length) });
        checkBuffers(await readTree(idle, "buffers"), "after a step without tokens");
        free(idle);
        sameBits(old, await readTree(router.buffers, "buffers"), "the old buffers");
      },
      { reason: sample.router.afterStep ? undefined : "the router has no afterStep" },
    ),
  ];
}

// ---------------------------------------------------------------- checkpoints
function checkpointCases({ sizes, make, route, input, hidden }: Kit): RouterCase[] {
  return [
    make("parameters and buffers survive save and load", async (subject) => {
      const { engine, plugin, router, experts } = subject;
      // As a file holds them: by path, floats as f32.
      const saved = async (tree: Tree, what: string): Promise<Answer> => {
        const paths = leaves(tree).map(([path]) => path);
        const twice = paths.find((path, i) => paths.indexOf(path) !== i);
        if (twice !== undefined)
          throw new Error(`two ${what} have the path "${twice}", so a file cannot tell them apart`);
        return new Map(
          [...(await readTree(tree, ""))].map(([path, x]) => [
            path,
            x.data instanceof Float64Array ? { ...x, data: Float64Array.from(Float32Array.from(x.data)) } : x,
          ]),
        );
      };
      const loaded = (tree: Tree, from: Answer): Tree =>
        mapTree(tree, (own, path) => {
          const x = array(from, `.${path}`);
          if (x.shape.join() !== own.shape.join())
            throw new Error(`${path} is [${own.shape.join(", ")}], what was saved is [${x.shape.join(", ")}]`);
          return engine.tensor(x.data, x.shape);
        });
      const stepped = (own: Router, buffers: Tree, answer: Answer): Tree => {
        const load = Float64Array.from({ length: loads(answer, experts) }, (_, e) => 1 + e);
        const statistics = { step: 3, totalSteps: 10, tokens: sizes.experts, load, metrics: metricsOf(answer) };
        return own.afterStep ? own.afterStep([statistics, { ...statistics }], buffers) : buffers;
      };
      const freed = (tree: Tree, but: Tree): void => {
        const kept = new Set(leaves(but).map(([, x]) => x));
        for (const [, x] of leaves(tree)) if (!kept.has(x)) x.dispose();
      };
      // Used first: what a router keeps beside its parameters and buffers is not in the file.
      const used = await route(subject, { training: true, hidden: hidden("before saving") });
      const next = engine.scope(() => stepped(router, router.buffers, used));
      const files = { params: await saved(router.params, "parameters"), buffers: await saved(next, "buffers") };
      freed(next, router.buffers);

      const answerAfter = async (own: Router): Promise<Answer> => {
        const trees = { params: loaded(own.params, files.params), buffers: loaded(own.buffers, files.buffers) };
        const found = new Map<string, HostArray>();
        for (const [mode, training] of modes) {
          const call = { training, hidden: hidden("after loading"), buffers: trees.buffers };
          const answer = await read(engine.scope(() => answerOf(own.route(trees.params, input(subject, call)))));
          for (const [name, x] of answer) found.set(`${mode}: ${name}`, x);
        }
        const after = engine.scope(() => stepped(own, trees.buffers, used));
        for (const [path, x] of await readTree(after, "after the next step")) found.set(path, x);
        freed(after, trees.buffers);
        dispose([trees.params, trees.buffers]);
        return found;
      };
      const one = await answerAfter(router);
      const context = routerContext(engine, { experts, width: sizes.width, seed: 99 });
      const other = plugin.init(context);
      const two = await answerAfter(other);
      dispose([other.params, other.buffers]);
      sameBits(one, two, "a router made anew, with what was saved");
    }),
  ];
}

// ---------------------------------------------------------------- edges
function edgeCases({ suite, sizes, tokens, make, route, hidden, check }: Kit): RouterCase[] {
  const both = async (subject: Subject, call: Call, rows: number): Promise<void> => {
    for (const [, training] of modes) check(subject, await route(subject, { training, ...call }), rows);
  };
  const reason =
    typeof suite.plugin === "function"
      ? undefined
      : "give the plugin as a function ({ experts, k }) => plugin to test other sizes";
  return [
    make("no tokens", async (subject) => {
      await both(subject, { batch: 1, hidden: hidden("none", 0) }, 0);
      await both(subject, { batch: 0, sequence: 3, hidden: hidden("none", 0) }, 0);
    }),
    make("one token", (subject) => both(subject, { batch: 1, hidden: hidden("single", 1) }, 1)),
    make("one expert", (subject) => both(subject, { hidden: hidden("one expert") }, tokens), {
      experts: 1,
      k: 1,
      reason,
    }),
    make("k = all experts", (subject) => both(subject, { hidden: hidden("all") }, tokens), {
      experts: 3,
      k: 3,
      reason,
    }),
    make("hidden states of zero", (subject) =>
      both(subject, { hidden: { shape: [tokens, sizes.width], data: new Float64Array(tokens * sizes.width) } }, tokens),
    ),
  ];
}
