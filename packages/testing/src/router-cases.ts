// What every router owes to the layer around it, as data: cases that throw. testRouter runs them in vitest.
import {
  add,
  autodiff,
  dispose,
  type Engine,
  engine as engineOf,
  grad,
  leaves,
  mapTree,
  mul,
  type Plan,
  random,
  type Routed,
  type Router,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
  sum,
  type Tensor,
  type Tree,
  watch,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { assertClose, coordinates, generator, type HostArray, sizeOf, type Tolerance, uniform } from "./arrays.ts";
import { download } from "./cases/case.ts";

/** Sizes a router is tested with. All distinct and none a multiple of another, so that mixed-up axes show. */
export interface RouterSizes {
  readonly experts: number;
  readonly width: number;
  readonly batch: number;
  readonly sequence: number;
}

/** What the weights of one token (of one expert, for expert-choice plans) obey, as the router documents it. */
export type WeightRule =
  | "sum to 1"
  | "sum to at most 1"
  | "not negative"
  | "any"
  | ((weights: readonly number[]) => boolean);

export interface RouterSuite {
  /**
   * The router. As a function it also gets the cases with one expert and with k = all experts: `k` is absent where the
   * router's own choice is meant.
   */
  readonly plugin: RouterPlugin | ((sizes: { readonly experts: number; readonly k?: number }) => RouterPlugin);
  /** What the documentation promises about weights in evaluation. Tokens without an expert are not asked. */
  readonly weights: WeightRule;
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

const defaults: RouterSizes = { experts: 5, width: 6, batch: 2, sequence: 7 };

/** A router made for a test, with what is needed to call it. */
interface Subject {
  readonly engine: Engine;
  readonly sizes: RouterSizes;
  readonly plugin: RouterPlugin;
  readonly router: Router;
}

interface Call {
  readonly training?: boolean;
  readonly seed?: number;
  readonly step?: number;
  readonly batch?: number;
  readonly sequence?: number;
  readonly past?: number;
  /** [batch * sequence, width] */
  readonly hidden: HostArray;
  /** [batch, past + sequence] */
  readonly mask?: readonly number[];
  readonly buffers?: Tree;
  readonly cache?: Tree;
  /** Flat position of the first token in the stream of token ids. */
  readonly offset?: number;
}

/** Everything a router decided, on the host: plan, losses, logits, probabilities, metrics, by name. */
type Answer = ReadonlyMap<string, HostArray>;

/** The cases of one router, with the reason where one does not apply. */
export function routerCases(suite: RouterSuite): readonly RouterCase[] {
  const { plugin: given, weights: rule } = suite;
  const tolerance: Tolerance = { absolute: 1e-10, relative: 1e-9, ...suite.tolerance };
  const sizes = { ...defaults, ...suite.sizes };
  const tokens = sizes.batch * sizes.sequence;
  const pluginOf = (experts: number, k?: number): RouterPlugin =>
    typeof given === "function" ? given({ experts, ...(k === undefined ? {} : { k }) }) : given;
  const sample = pluginOf(sizes.experts);
  const hiddenOf = (key: string, rows = tokens): HostArray =>
    uniform(generator(`router hidden ${key}`), [rows, sizes.width], -1.5, 1.5);

  /** Makes a router, runs the body, frees everything and checks that nothing else is left. */
  const withRouter = async (
    body: (subject: Subject) => Promise<void>,
    options: { experts?: number; k?: number; seed?: number } = {},
  ): Promise<void> => {
    const engine = suite.engine?.() ?? engineOf(cpu({ precision: 64 }));
    const before = engine.live();
    const own = { ...sizes, experts: options.experts ?? sizes.experts };
    const plugin = pluginOf(own.experts, options.k);
    const router = makeRouter(engine, plugin, own, options.seed ?? 1);
    try {
      await body({ engine, sizes: own, plugin, router });
    } finally {
      dispose(router.params);
      dispose(router.buffers);
    }
    const after = engine.live();
    if (after !== before) throw new Error(`${after - before} handles were left alive: dispose what route or afterStep made`);
  };

  const inputOf = (subject: Subject, call: Call): RouterInput => {
    const base = makeInput(subject, call);
    return { ...base, ...suite.input?.(base) };
  };
  const route = async (subject: Subject, call: Call): Promise<Answer> => {
    const { engine, router } = subject;
    const routed = engine.scope(() => collect(router.route(router.params, inputOf(subject, call))));
    return read(routed);
  };

  const cases: RouterCase[] = [];
  const define = (name: string, run: () => Promise<void>, reason?: string): void => {
    cases.push({ name, run, ...(reason === undefined ? {} : { reason }) });
  };
  const modes = [
    ["training", true],
    ["evaluation", false],
  ] as const;

  // ---------------------------------------------------------------- form
  for (const [mode, training] of modes)
    define(`${mode}: plan, losses and probabilities are well formed`, () =>
      withRouter(async (subject) => {
        const answer = await route(subject, { training, hidden: hiddenOf("form") });
        checkForm(subject, answer, tokens);
      }),
    );
  define("weights obey the documented rule", () =>
    withRouter(async (subject) => {
      const answer = await route(subject, { hidden: hiddenOf("weights") });
      for (const [i, row] of weightRows(answer).entries()) {
        if (row.length === 0 || obeys(rule, row)) continue;
        const asked = typeof rule === "string" ? rule : "obey the rule of the suite";
        throw new Error(`weights [${row.join(", ")}] of row ${i} do not ${asked}`);
      }
    }),
  );
  define("only declared plan kinds", () =>
    withRouter(async (subject) => {
      for (const training of [true, false]) {
        const answer = await route(subject, { training, hidden: hiddenOf("kinds") });
        const found = kindOf(answer);
        if (!subject.plugin.plans.includes(found))
          throw new Error(`route gave a "${found}" plan, the plugin declares ${subject.plugin.plans.join(", ")}`);
      }
    }),
  );

  // ---------------------------------------------------------------- determinism
  define("the same seed gives the same parameters and the same answer", async () => {
    const answers: Answer[] = [];
    for (let i = 0; i < 2; i++)
      await withRouter(async (subject) => {
        const params = await readTree(subject.router.params, "params");
        const routed = await route(subject, { training: true, seed: 3, hidden: hiddenOf("seed") });
        answers.push(new Map([...params, ...routed]));
      });
    sameBits(answers[0] as Answer, answers[1] as Answer, "second run");
  });
  define("evaluation does not depend on seed or step", () =>
    withRouter(async (subject) => {
      const hidden = hiddenOf("evaluation");
      const first = await route(subject, { hidden, seed: 3, step: 5 });
      const second = await route(subject, { hidden, seed: 4, step: 6 });
      sameBits(first, second, "other seed and step");
    }),
  );
  define("route leaves parameters and buffers as they were", () =>
    withRouter(async (subject) => {
      const state = async (): Promise<Answer> =>
        new Map([
          ...(await readTree(subject.router.params, "params")),
          ...(await readTree(subject.router.buffers, "buffers")),
        ]);
      const before = await state();
      await route(subject, { training: true, hidden: hiddenOf("state") });
      sameBits(before, await state(), "after route");
    }),
  );
  define("score, then select, is route", () =>
    withRouter(async (subject) => {
      const { engine, router } = subject;
      for (const training of [true, false]) {
        const call: Call = { training, seed: 3, hidden: hiddenOf("halves") };
        const whole = await route(subject, call);
        const halves = engine.scope(() => {
          const input = inputOf(subject, call);
          if (!router.score || !router.select) throw new Error("a router with score has select too");
          return collect(router.select(router.score(router.params, input), input));
        });
        sameBits(whole, await read(halves), "select(score)");
      }
    }),
    halvesMissing(),
  );

  // ---------------------------------------------------------------- symmetry
  define("permuting the experts permutes the answer", () =>
    withRouter(async (subject) => {
      const { engine, router } = subject;
      const n = sizes.experts;
      // A cyclic shift by two: expert e is called order[e] afterwards.
      const order = Array.from({ length: n }, (_, e) => (e + 2) % n);
      const hidden = hiddenOf("permute");
      const plain = await route(subject, { hidden });
      const permute = async (tree: Tree): Promise<Tree> => {
        const found = await readTree(tree, "");
        return mapTree(tree, (_, path) => {
          const x = permuted(found.get(`.${path}`) as HostArray, n, order);
          return engine.tensor(x.data, x.shape);
        });
      };
      const params = await permute(router.params);
      const buffers = await permute(router.buffers);
      const input = { hidden, buffers };
      const moved = engine.scope(() => collect(router.route(params, inputOf(subject, input))));
      const answer = await read(moved);
      dispose(params);
      dispose(buffers);
      const [before, after] = [assignments(plain, tokens, n), assignments(answer, tokens, n)];
      const expected = new Float64Array(before.data.length);
      const columns = before.shape[1] ?? 0;
      const perExpert = columns / n;
      for (let i = 0; i < expected.length; i++) {
        const column = i % columns;
        const target = (order[Math.floor(column / perExpert)] ?? 0) * perExpert + (column % perExpert);
        expected[i - column + target] = before.data[i] ?? 0;
      }
      assertClose("weights after the permutation", after, { shape: before.shape, data: expected }, tolerance);
      for (const [name, value] of plain)
        if (name.startsWith("loss ")) assertClose(name, answer.get(name) as HostArray, value, tolerance);
    }),
  );

  // ---------------------------------------------------------------- padding
  const mask = Array.from({ length: tokens }, (_, i) => {
    const [row, position] = [Math.floor(i / sizes.sequence), i % sizes.sequence];
    // The first row starts with padding, the others end with it.
    return row === 0 ? Number(position >= 1) : Number(position < sizes.sequence - 2);
  });
  const repainted = (x: HostArray, where: (token: number) => boolean): HostArray => {
    const other = uniform(generator("repainted"), x.shape, -3, 3);
    return { shape: x.shape, data: x.data.map((value, i) => (where(Math.floor(i / sizes.width)) ? (other.data[i] ?? 0) : value)) as Float64Array };
  };
  for (const [mode, training] of modes) {
    define(`${mode}: padding gets no expert and no weight`, () =>
      withRouter(async (subject) => {
        const answer = await route(subject, { training, hidden: hiddenOf("padding"), mask });
        checkForm(subject, answer, tokens);
        const touched = assignments(answer, tokens, sizes.experts, true);
        const columns = touched.shape[1] ?? 0;
        mask.forEach((real, token) => {
          const row = touched.data.subarray(token * columns, (token + 1) * columns);
          if (real === 0 && row.some((value) => value !== 0))
            throw new Error(`padded token ${token} was sent to experts: [${row.join(", ")}]`);
        });
      }),
    );
    define(`${mode}: what stands in padding changes nothing`, () =>
      withRouter(async (subject) => {
        const hidden = hiddenOf("padding");
        const first = await route(subject, { training, hidden, mask });
        const second = await route(subject, { training, hidden: repainted(hidden, (t) => mask[t] === 0), mask });
        samePlanAndLosses(first, second, "other values in padding");
      }),
    );
  }
  define("a padded sequence equals the sequence alone", () =>
    withRouter(async (subject) => {
      const real = sizes.sequence - 2;
      const hidden = hiddenOf("alone", sizes.sequence);
      const short: HostArray = { shape: [real, sizes.width], data: hidden.data.slice(0, real * sizes.width) };
      const long = await route(subject, {
        batch: 1,
        hidden,
        mask: Array.from({ length: sizes.sequence }, (_, i) => Number(i < real)),
      });
      const alone = await route(subject, { batch: 1, sequence: real, hidden: short });
      const [a, b] = [
        assignments(long, sizes.sequence, sizes.experts),
        assignments(alone, real, sizes.experts),
      ];
      const cut = { shape: b.shape, data: a.data.slice(0, b.data.length) };
      assertClose("weights of the real tokens", cut, b, tolerance);
      for (const [name, value] of alone)
        if (name.startsWith("loss ")) assertClose(name, long.get(name) as HostArray, value, tolerance);
    }),
  );
  define("nothing but padding", () =>
    withRouter(async (subject) => {
      for (const training of [true, false]) {
        const answer = await route(subject, { training, hidden: hiddenOf("empty"), mask: mask.map(() => 0) });
        checkForm(subject, answer, tokens);
        const touched = assignments(answer, tokens, sizes.experts, true);
        if (touched.data.some((value) => value !== 0)) throw new Error("a batch of padding was sent to experts");
      }
    }),
  );

  // ---------------------------------------------------------------- causality
  for (const [mode, training] of modes)
    define(
      `${mode}: never looks ahead`,
      () =>
        withRouter(async (subject) => {
          const hidden = hiddenOf("causal");
          const first = assignments(await route(subject, { training, hidden }), tokens, sizes.experts);
          const columns = first.shape[1] ?? 0;
          for (let row = 0; row < sizes.batch; row++)
            for (let t = 0; t + 1 < sizes.sequence; t++) {
              const from = row * sizes.sequence + t + 1;
              const to = (row + 1) * sizes.sequence;
              const changed = repainted(hidden, (token) => token >= from && token < to);
              const second = assignments(await route(subject, { training, hidden: changed }), tokens, sizes.experts);
              for (let i = row * sizes.sequence * columns; i < from * columns; i++)
                if (!Object.is(first.data[i], second.data[i]))
                  throw new Error(
                    `changing tokens from ${t + 1} on in row ${row} changed the weight of token ` +
                      `${Math.floor(i / columns) - row * sizes.sequence}: ${first.data[i]} became ${second.data[i]}`,
                  );
            }
        }),
      sample.causal[mode] ? undefined : `the plugin declares that it is not causal in ${mode}`,
    );
  define(
    "decoding token by token equals the whole sequence",
    () =>
      withRouter(async (subject) => {
        const { engine, router } = subject;
        const hidden = hiddenOf("decode");
        const whole = assignments(await route(subject, { hidden }), tokens, sizes.experts);
        const columns = whole.shape[1] ?? 0;
        let cache: Tree | undefined;
        for (let t = 0; t < sizes.sequence; t++) {
          const rows = Array.from({ length: sizes.batch }, (_, row) => row * sizes.sequence + t);
          const pick = (x: HostArray, width: number): Float64Array =>
            Float64Array.from(rows.flatMap((token) => [...x.data.subarray(token * width, (token + 1) * width)]));
          const call: Call = {
            sequence: 1,
            past: t,
            offset: t,
            hidden: { shape: [sizes.batch, sizes.width], data: pick(hidden, sizes.width) },
            ...(cache === undefined ? {} : { cache }),
          };
          const step = engine.scope(() => {
            const routed = router.route(router.params, inputOf(subject, call));
            return { answer: collect(routed), cache: routed.cache };
          });
          if (cache !== undefined && cache !== step.cache) dispose(cache);
          cache = step.cache;
          const found = assignments(await read(step.answer), sizes.batch, sizes.experts);
          const expected = { shape: found.shape, data: pick(whole, columns) };
          assertClose(`weights at position ${t}`, found, expected, tolerance);
        }
        if (cache !== undefined) dispose(cache);
      }),
    sample.causal.evaluation ? undefined : "the plugin declares that it is not causal in evaluation",
  );

  // ---------------------------------------------------------------- gradients
  define("gradients of weights and losses agree with central differences", () =>
    withRouter(async (subject) => {
      const hidden = hiddenOf("gradient");
      const params = await readTree(subject.router.params, "");
      const inputs = [...params].filter(([, x]) => x.data instanceof Float64Array);
      await checkGradients(subject, inputOf, hidden, new Map(inputs));
    }),
  );

  // ---------------------------------------------------------------- state
  define(
    "buffers survive a step",
    () =>
      withRouter(async (subject) => {
        const { engine, router } = subject;
        const answer = await route(subject, { training: true, hidden: hiddenOf("step") });
        const load = new Float64Array(sizes.experts);
        const counted = assignments(answer, tokens, sizes.experts, true);
        const perExpert = (counted.shape[1] ?? 0) / sizes.experts;
        counted.data.forEach((value, i) => {
          const e = Math.floor((i % (sizes.experts * perExpert)) / perExpert);
          load[e] = (load[e] ?? 0) + (value === 0 ? 0 : 1);
        });
        const metrics = Object.fromEntries(
          [...answer].flatMap(([name, x]) => (name.startsWith("metric ") ? [[name.slice(7), Float64Array.from(x.data)]] : [])),
        );
        const layer = { step: 0, totalSteps: 10, tokens, load, metrics };
        const next = engine.scope(() => {
          if (!router.afterStep) throw new Error("no afterStep");
          return router.afterStep([layer, { ...layer, load: load.slice() }], router.buffers);
        });
        const [old, fresh] = [await readTree(router.buffers, "buffers"), await readTree(next, "buffers")];
        if ([...old.keys()].join() !== [...fresh.keys()].join())
          throw new Error(`afterStep returned ${[...fresh.keys()].join(", ")}, the router has ${[...old.keys()].join(", ")}`);
        for (const [name, x] of fresh) {
          if (x.shape.join() !== old.get(name)?.shape.join()) throw new Error(`${name} changed its shape to [${x.shape.join(", ")}]`);
          if (!x.data.every(Number.isFinite)) throw new Error(`${name} is [${x.data.join(", ")}] after a step`);
        }
        const again = await route(subject, { training: true, step: 1, hidden: hiddenOf("step"), buffers: next });
        checkForm(subject, again, tokens);
        const kept = new Set(leaves(router.buffers).map(([, x]) => x));
        for (const [, x] of leaves(next)) if (!kept.has(x)) x.dispose();
      }),
    stateMissing(),
  );

  // ---------------------------------------------------------------- edges
  define("no tokens", () =>
    withRouter(async (subject) => {
      for (const training of [true, false])
        for (const [batch, sequence] of [
          [1, 0],
          [0, 3],
        ] as const) {
          const answer = await route(subject, { training, batch, sequence, hidden: hiddenOf("none", 0) });
          checkForm(subject, answer, 0);
        }
    }),
  );
  define("one token", () =>
    withRouter(async (subject) => {
      for (const training of [true, false]) {
        const answer = await route(subject, { training, batch: 1, sequence: 1, hidden: hiddenOf("single", 1) });
        checkForm(subject, answer, 1);
      }
    }),
  );
  const sized = typeof given === "function" ? undefined : "give the plugin as a function ({ experts, k }) => plugin to test other sizes";
  define(
    "one expert",
    () =>
      withRouter(
        async (subject) => {
          for (const training of [true, false])
            checkForm(subject, await route(subject, { training, hidden: hiddenOf("one expert") }), tokens);
        },
        { experts: 1, k: 1 },
      ),
    sized,
  );
  define(
    "k = all experts",
    () =>
      withRouter(
        async (subject) => {
          for (const training of [true, false])
            checkForm(subject, await route(subject, { training, hidden: hiddenOf("all experts") }), tokens);
        },
        { experts: 3, k: 3 },
      ),
    sized,
  );
  define("equal logits are no trouble", () =>
    withRouter(async (subject) => {
      const zeros: HostArray = { shape: [tokens, sizes.width], data: new Float64Array(tokens * sizes.width) };
      for (const training of [true, false]) checkForm(subject, await route(subject, { training, hidden: zeros }), tokens);
    }),
  );
  return cases;

  function probe(): Router {
    const engine = suite.engine?.() ?? engineOf(cpu({ precision: 64 }));
    const router = makeRouter(engine, sample, sizes, 1);
    dispose(router.params);
    dispose(router.buffers);
    return router;
  }
  function halvesMissing(): string | undefined {
    const router = probe();
    return router.score && router.select ? undefined : "the router does not tell score and select apart";
  }
  function stateMissing(): string | undefined {
    return probe().afterStep ? undefined : "the router has no afterStep";
  }
}

// ---------------------------------------------------------------- calling a router
function makeRouter(engine: Engine, plugin: RouterPlugin, sizes: RouterSizes, seed: number): Router {
  const shared = new Map<string, unknown>();
  const context: RouterContext = {
    engine,
    width: sizes.width,
    experts: sizes.experts,
    heads: 2,
    layer: 0,
    layers: 2,
    random: random(engine, seed).at("init"),
    tokenCounts: Float64Array.from({ length: vocabulary }, (_, id) => vocabulary - id),
    shared<T>(key: string, make: () => T): T {
      if (!shared.has(key)) shared.set(key, make());
      return shared.get(key) as T;
    },
  };
  return plugin.init(context);
}
const vocabulary = 13;

function makeInput({ engine, sizes, router }: Subject, call: Call): RouterInput {
  const { batch = sizes.batch, sequence = sizes.sequence, past = 0, offset = 0 } = call;
  const tokens = batch * sequence;
  const total = past + sequence;
  const tensor = (x: HostArray): Tensor => engine.tensor(x.data, x.shape);
  const ids = (name: string, below: number): Tensor => {
    // One stream per row of the batch, so that a prefix and a single position see the same ids.
    const data = Int32Array.from({ length: tokens }, (_, i) => {
      const [row, position] = [Math.floor(i / Math.max(sequence, 1)), (i % Math.max(sequence, 1)) + offset];
      return Math.floor(generator(`${name} ${row} ${position}`)() * below);
    });
    return engine.tensor(data, [tokens]);
  };
  return {
    hidden: tensor(call.hidden),
    layout: { batch, sequence, past, ...(call.mask ? { mask: engine.tensor(Float32Array.from(call.mask), [batch, total]) } : {}) },
    training: call.training ?? false,
    step: call.step ?? 0,
    totalSteps: 10,
    pass: 0,
    layer: 0,
    layers: 2,
    random: random(engine, call.seed ?? 2).at("route"),
    buffers: call.buffers ?? router.buffers,
    tokenIds: ids("token", vocabulary),
    modalityIds: ids("modality", 2),
    attention: () => engine.tensor(uniformAttention(batch, 2, sequence, total), [batch, 2, sequence, total]),
    everyExpert: () => tensor(uniform(generator("every expert"), [tokens, sizes.experts, sizes.width])),
    ...(call.cache === undefined ? {} : { cache: call.cache }),
  };
}

/** Causal attention that looks at everything before alike. */
function uniformAttention(batch: number, heads: number, sequence: number, total: number): Float64Array {
  const data = new Float64Array(batch * heads * sequence * total);
  for (let i = 0; i < data.length; i++) {
    const position = total - sequence + (Math.floor(i / total) % sequence);
    if (i % total <= position) data[i] = 1 / (position + 1);
  }
  return data;
}

/** The tensors of a decision, by name, so that they leave the scope together. */
function collect(routed: Routed): Map<string, Tensor> {
  const found = new Map<string, Tensor>();
  const { plan, logits, probabilities, losses, metrics = {} } = routed;
  const put = (name: string, x: Tensor | undefined): void => {
    if (x !== undefined) found.set(name, x);
  };
  const planned = (prefix: string, one: Plan): void => {
    switch (one.kind) {
      case "sparse":
        put(`${prefix}sparse experts`, one.experts);
        put(`${prefix}sparse weights`, one.weights);
        break;
      case "dense":
        put(`${prefix}dense weights`, one.weights);
        break;
      case "expert-choice":
        put(`${prefix}expert-choice tokens`, one.tokens);
        put(`${prefix}expert-choice weights`, one.weights);
        break;
      case "slots":
        put(`${prefix}slots dispatch`, one.dispatch);
        put(`${prefix}slots combine`, one.combine);
        break;
      case "merge":
        put(`${prefix}merge groups`, one.groups);
        one.coefficients.forEach((x, i) => {
          put(`${prefix}merge coefficients ${i}`, x);
        });
        break;
      default:
        one satisfies never;
    }
  };
  planned("plan ", plan);
  for (const [i, path] of (routed.more ?? []).entries()) planned(`more ${i} `, path.plan);
  put("logits", logits);
  put("probabilities", probabilities);
  put("rows", routed.rows);
  for (const [name, loss] of Object.entries(losses)) put(`loss ${name}`, loss.value);
  for (const [name, x] of Object.entries(metrics)) put(`metric ${name}`, x);
  return found;
}

async function read(tensors: ReadonlyMap<string, Tensor>): Promise<Answer> {
  try {
    return new Map(await Promise.all([...tensors].map(async ([name, x]) => [name, await download(x)] as const)));
  } finally {
    for (const x of tensors.values()) x.dispose();
  }
}
async function readTree(tree: Tree, prefix: string): Promise<Answer> {
  return new Map(
    await Promise.all(leaves(tree).map(async ([path, x]) => [`${prefix}.${path}`, await download(x)] as const)),
  );
}

// ---------------------------------------------------------------- looking at an answer
const array = (answer: Answer, name: string): HostArray => {
  const x = answer.get(name);
  if (x === undefined) throw new Error(`the answer has no ${name}; it has ${[...answer.keys()].join(", ")}`);
  return x;
};
const kinds: readonly Plan["kind"][] = ["sparse", "dense", "expert-choice", "slots", "merge"];
function kindOf(answer: Answer): Plan["kind"] {
  const found = kinds.find((kind) => [...answer.keys()].some((name) => name.startsWith(`plan ${kind} `)));
  if (found === undefined) throw new Error(`route gave no plan: ${[...answer.keys()].join(", ")}`);
  return found;
}

/**
 * The plan as a matrix of weights, [tokens, experts] (slots: dispatch and combine, merge: the coefficients of each token).
 * `hits`: 1 where a token meets an expert, whatever the weight; null experts count for nobody.
 */
function assignments(answer: Answer, tokens: number, experts: number, hits = false): HostArray {
  const kind = kindOf(answer);
  const at = (x: HostArray, i: number): number => x.data[i] ?? 0;
  const matrix = (columns: number, fill: (data: Float64Array) => void): HostArray => {
    const data = new Float64Array(tokens * columns);
    fill(data);
    return { shape: [tokens, columns], data };
  };
  switch (kind) {
    case "sparse": {
      const [ids, weights] = [array(answer, "plan sparse experts"), array(answer, "plan sparse weights")];
      const k = ids.shape[1] ?? 1;
      return matrix(experts, (data) => {
        ids.data.forEach((e, i) => {
          if (e < 0 || e >= experts) return;
          const to = Math.floor(i / k) * experts + e;
          data[to] = hits ? 1 : (data[to] ?? 0) + at(weights, i);
        });
      });
    }
    case "dense": {
      const weights = array(answer, "plan dense weights");
      // A dense plan runs every expert; what counts is where it is not zero.
      return matrix(experts, (data) => {
        for (let i = 0; i < data.length; i++) data[i] = hits ? Number(at(weights, i) !== 0) : at(weights, i);
      });
    }
    case "expert-choice": {
      const [ids, weights] = [array(answer, "plan expert-choice tokens"), array(answer, "plan expert-choice weights")];
      const capacity = ids.shape[1] ?? 1;
      return matrix(experts, (data) => {
        ids.data.forEach((token, i) => {
          if (token < 0 || token >= tokens) return;
          const to = token * experts + Math.floor(i / capacity);
          data[to] = hits ? 1 : (data[to] ?? 0) + at(weights, i);
        });
      });
    }
    case "slots": {
      const [dispatch, combine] = [array(answer, "plan slots dispatch"), array(answer, "plan slots combine")];
      const slots = dispatch.shape[2] ?? 0;
      // Interleaved, so that the columns of one expert stay together.
      return matrix(2 * slots, (data) => {
        for (let i = 0; i < tokens * slots; i++) {
          data[2 * i] = at(dispatch, i);
          data[2 * i + 1] = at(combine, i);
        }
      });
    }
    case "merge": {
      const [groups, coefficients] = [array(answer, "plan merge groups"), array(answer, "plan merge coefficients 0")];
      return matrix(experts, (data) => {
        for (let i = 0; i < data.length; i++) {
          const group = at(groups, Math.floor(i / experts));
          if (group >= 0) data[i] = at(coefficients, group * experts + (i % experts));
        }
      });
    }
    default:
      return kind satisfies never;
  }
}

function checkForm({ sizes, plugin }: Subject, answer: Answer, tokens: number): void {
  const expectShape = (name: string, shape: readonly (number | undefined)[]): HostArray => {
    const x = array(answer, name);
    if (x.shape.length !== shape.length || shape.some((n, i) => n !== undefined && n !== x.shape[i]))
      throw new Error(`${name} is [${x.shape.join(", ")}], expected [${shape.map((n) => n ?? "any").join(", ")}]`);
    return x;
  };
  for (const [name, x] of answer) {
    if (!x.data.every(Number.isFinite)) {
      const i = x.data.findIndex((value) => !Number.isFinite(value));
      // Masked experts have logits of -inf; anything else must be a number.
      if (name !== "logits" || x.data[i] !== Number.NEGATIVE_INFINITY)
        throw new Error(`${name}, entry [${coordinates(i, x.shape).join(", ")}], is ${x.data[i]}`);
    }
    if (name.startsWith("loss ") && x.shape.length !== 0)
      throw new Error(`${name} is [${x.shape.join(", ")}], expected one number, []`);
  }
  for (const name of ["logits", "probabilities"]) {
    const x = answer.get(name);
    if (x && (x.shape.length !== 2 || x.shape[0] !== tokens || (x.shape[1] ?? 0) < sizes.experts))
      throw new Error(`${name} is [${x.shape.join(", ")}], expected [${tokens}, at least ${sizes.experts}]`);
  }
  const kind = kindOf(answer);
  const nulls = ((answer.get("probabilities") ?? answer.get("logits"))?.shape[1] ?? sizes.experts) - sizes.experts;
  switch (kind) {
    case "sparse": {
      const ids = expectShape("plan sparse experts", [tokens, undefined]);
      const weights = expectShape("plan sparse weights", ids.shape);
      checkIds(ids, sizes.experts + nulls, `experts 0..${sizes.experts - 1}`);
      checkEmpty(ids, weights);
      checkDistinct(ids, sizes.experts, "token", "expert");
      break;
    }
    case "dense":
      expectShape("plan dense weights", [tokens, sizes.experts]);
      break;
    case "expert-choice": {
      const ids = expectShape("plan expert-choice tokens", [sizes.experts, undefined]);
      const weights = expectShape("plan expert-choice weights", ids.shape);
      checkIds(ids, tokens, `tokens 0..${tokens - 1}`);
      checkEmpty(ids, weights);
      checkDistinct(ids, tokens, "expert", "token");
      break;
    }
    case "slots": {
      const dispatch = expectShape("plan slots dispatch", [undefined, undefined, undefined]);
      expectShape("plan slots combine", dispatch.shape);
      if ((dispatch.shape[0] ?? 0) * (dispatch.shape[1] ?? 0) !== tokens || (dispatch.shape[2] ?? 0) % sizes.experts !== 0)
        throw new Error(`slots plan [${dispatch.shape.join(", ")}] for ${tokens} tokens and ${sizes.experts} experts`);
      break;
    }
    case "merge": {
      const groups = expectShape("plan merge groups", [tokens]);
      const coefficients = expectShape("plan merge coefficients 0", [undefined, sizes.experts]);
      checkIds(groups, coefficients.shape[0] ?? 0, `groups 0..${(coefficients.shape[0] ?? 0) - 1}`);
      break;
    }
    default:
      kind satisfies never;
  }
  if (!plugin.plans.includes(kind)) throw new Error(`a "${kind}" plan, the plugin declares ${plugin.plans.join(", ")}`);
}
function checkIds(ids: HostArray, count: number, what: string): void {
  if (!(ids.data instanceof Int32Array)) throw new Error("ids must be i32");
  const i = ids.data.findIndex((id) => id < -1 || id >= count);
  if (i >= 0) throw new Error(`id ${ids.data[i]} at [${coordinates(i, ids.shape).join(", ")}] is neither -1 nor one of ${what}`);
}
function checkEmpty(ids: HostArray, weights: HostArray): void {
  const i = ids.data.findIndex((id, slot) => id === -1 && weights.data[slot] !== 0);
  if (i >= 0) throw new Error(`the empty slot [${coordinates(i, ids.shape).join(", ")}] has weight ${weights.data[i]}, expected 0`);
}
function checkDistinct(ids: HostArray, below: number, owner: string, chosen: string): void {
  const [rows = 0, k = 0] = ids.shape;
  for (let row = 0; row < rows; row++) {
    const own = [...ids.data.subarray(row * k, (row + 1) * k)].filter((id) => id >= 0 && id < below);
    if (new Set(own).size !== own.length) throw new Error(`${owner} ${row} has one ${chosen} twice: [${own.join(", ")}]`);
  }
}

/** The weights that belong together by row of the plan, empty slots left out. */
function weightRows(answer: Answer): number[][] {
  const kind = kindOf(answer);
  const rows = (x: HostArray, keep: (i: number) => boolean): number[][] => {
    const width = x.shape.at(-1) ?? 1;
    return Array.from({ length: width === 0 ? 0 : x.data.length / width }, (_, row) =>
      [...x.data.subarray(row * width, (row + 1) * width)].filter((_, j) => keep(row * width + j)),
    );
  };
  if (kind === "sparse") {
    const ids = array(answer, "plan sparse experts");
    return rows(array(answer, "plan sparse weights"), (i) => (ids.data[i] ?? -1) >= 0);
  }
  if (kind === "expert-choice") {
    const ids = array(answer, "plan expert-choice tokens");
    return rows(array(answer, "plan expert-choice weights"), (i) => (ids.data[i] ?? -1) >= 0);
  }
  const name = { dense: "plan dense weights", slots: "plan slots combine", merge: "plan merge coefficients 0" }[kind];
  return rows(array(answer, name), () => true);
}
function obeys(rule: WeightRule, weights: readonly number[]): boolean {
  const total = weights.reduce((sum_, weight) => sum_ + weight, 0);
  const positive = weights.every((weight) => weight >= 0);
  switch (rule) {
    case "sum to 1":
      return positive && Math.abs(total - 1) < 1e-5;
    case "sum to at most 1":
      return positive && total < 1 + 1e-5;
    case "not negative":
      return positive;
    case "any":
      return true;
    default:
      return rule(weights);
  }
}

function sameBits(a: Answer, b: Answer, what: string): void {
  for (const [name, x] of a) assertClose(`${what}: ${name}`, array(b, name), x, { absolute: 0, relative: 0 });
  for (const name of b.keys()) array(a, name);
}
function samePlanAndLosses(a: Answer, b: Answer, what: string): void {
  const kept = (answer: Answer): Answer =>
    new Map([...answer].filter(([name]) => name.startsWith("plan ") || name.startsWith("more ") || name.startsWith("loss ")));
  sameBits(kept(a), kept(b), what);
}

/** x with every axis of `count` entries reordered: entry e moves to order[e]. */
function permuted(x: HostArray, count: number, order: readonly number[]): HostArray {
  const data = x.data.slice();
  for (let i = 0; i < data.length; i++) {
    const index = coordinates(i, x.shape).map((position, axis) =>
      x.shape[axis] === count ? (order[position] ?? 0) : position,
    );
    data[index.reduce((flat, position, axis) => flat * (x.shape[axis] ?? 1) + position, 0)] = x.data[i] ?? 0;
  }
  return { shape: x.shape, data };
}

// ---------------------------------------------------------------- gradients
/** Weighted sum of everything differentiable in a decision. */
function objective(routed: Routed, engine: Engine): Tensor {
  const tensors = collect(routed);
  let total: Tensor | undefined;
  for (const [name, x] of tensors) {
    if (x.dtype !== "f32" || name.startsWith("metric ") || name === "logits" || name === "probabilities") continue;
    const weights = uniform(generator(`objective ${name}`), x.shape, 0.5, 1.5);
    const term = sum(mul(x, engine.tensor(weights.data, x.shape)));
    total = total ? add(total, term) : term;
  }
  if (!total) throw new Error("the plan has no weights");
  return total;
}

async function checkGradients(
  subject: Subject,
  inputOf: (subject: Subject, call: Call) => RouterInput,
  hidden: HostArray,
  params: ReadonlyMap<string, HostArray>,
): Promise<void> {
  const { engine, router } = subject;
  const place = (values: ReadonlyMap<string, HostArray>): Tree =>
    mapTree(router.params, (leaf, path) => {
      const x = values.get(`.${path}`);
      return x ? engine.tensor(x.data, x.shape) : leaf;
    });
  const valueAt = async (h: HostArray, values: ReadonlyMap<string, HostArray>): Promise<number> => {
    const y = engine.scope(() => objective(router.route(place(values), inputOf(subject, { training: true, hidden: h })), engine));
    const [value] = await y.data();
    y.dispose();
    return value ?? Number.NaN;
  };
  const analytic = engine.scope(() => {
    const outer = autodiff(engine);
    const watched = watch(outer, { params: place(params), hidden: engine.tensor(hidden.data, hidden.shape) });
    const input = { ...inputOf(subject, { training: true, hidden }), hidden: watched.hidden };
    return grad(objective(router.route(watched.params, input), engine), watched);
  });
  const found = await readTree(analytic, "");
  dispose(analytic);

  const compare = async (name: string, x: HostArray, at: (moved: HostArray) => Promise<number>): Promise<void> => {
    const slopes = array(found, name);
    for (let i = 0; i < x.data.length; i++) {
      const step = 1e-6 * Math.max(1, Math.abs(x.data[i] ?? 0));
      const value = async (by: number): Promise<number> => {
        const data = Float64Array.from(x.data);
        data[i] = (data[i] ?? 0) + by;
        return at({ shape: x.shape, data });
      };
      const numeric = ((await value(step)) - (await value(-step))) / (2 * step);
      const slope = slopes.data[i] ?? Number.NaN;
      if (!(Math.abs(slope - numeric) <= 1e-6 + 1e-5 * Math.abs(numeric)))
        throw new Error(
          `${name.slice(1)} [${coordinates(i, x.shape).join(", ")}]: autodiff gives ${slope}, central differences give ${numeric}`,
        );
    }
  };
  for (const [name, x] of params)
    await compare(`.params${name}`, x, (moved) => valueAt(hidden, new Map([...params, [name, moved]])));
  await compare(".hidden", hidden, (moved) => valueAt(moved, params));
  const silent = [...params.keys()].filter((name) => sizeOf(array(found, `.params${name}`).shape) > 0 && array(found, `.params${name}`).data.every((value) => value === 0));
  if (params.size > 0 && silent.length === params.size) throw new Error("no gradient reaches any parameter of the router");
}
