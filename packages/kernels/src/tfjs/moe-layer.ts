// A Mixture-of-Experts layer for tf.layers: drops into a LayersModel, trains with model.fit, saves and loads with the model. Its
// forward pass and its gradient are core's, inside one tf.customGrad; its weights are ordinary variables of the model, whose storage
// both sides share.
import {
  add,
  autodiff,
  cast,
  dispose,
  type Engine,
  engine,
  grad,
  type Json,
  leaves,
  mapTree,
  mul,
  random,
  reshape,
  ShapeError,
  sum,
  type Tensor,
  type Tree,
  UnsupportedError,
  watch,
} from "@switchyard/core";
import {
  type Activation,
  ffn,
  glu,
  type Layout,
  layerInput,
  layerParams,
  type MoELayer,
  moe,
  moeLayer,
  type Need,
  type RouterPlugin,
} from "@switchyard/core/moe";
import { tfjsNow } from "./backend.ts";
import { item, same, sizeOf } from "./device.ts";
import { fromTfjs, toTfjs } from "./interop.ts";
import type { TfCore, TfNamespace, TfTensor } from "./tf.ts";

/** Makes a router from the options that its plugin reports: `topK` of @switchyard/routers, for one. */
export type RouterFactory = (options: never) => RouterPlugin;

export interface MoELibrary<L extends object> {
  /** @tensorflow/tfjs, tfjs-node, or tfjs-core. */
  readonly tf: TfNamespace & { readonly serialization: { registerClass(...args: never[]): unknown } };
  /** `tf.layers`, or `layers` of @tensorflow/tfjs-layers. */
  readonly layers: { readonly Layer: abstract new (...args: never[]) => L };
  /** The routers that layers, and saved models, may name: `{ topK }`. The key is the plugin's name. */
  readonly routers: Readonly<Record<string, RouterFactory>>;
}

/** Arguments of one layer. */
export interface MoEArgs {
  /** Number of experts. */
  readonly experts: number;
  /** Width inside each expert. */
  readonly hidden: number;
  /** Which experts a token takes: `topK({ k: 2 })`. Its factory must be among the library's routers. */
  readonly router: RouterPlugin;
  /** Default "silu". */
  readonly activation?: Activation;
  /** Gated experts, y = down (act(gate x) * up x), the default; false: y = down act(up x). */
  readonly gated?: boolean;
  /** Default false. */
  readonly bias?: boolean;
  /** Of the initial weights and the router's noise; default 0. */
  readonly seed?: number;
  readonly name?: string;
  /** Default true. */
  readonly trainable?: boolean;
  /** Without the batch: [width] or [sequence, width]; for a first layer. */
  readonly inputShape?: readonly (number | null)[];
  readonly batchInputShape?: readonly (number | null)[];
}

/** What is saved with a model. */
interface Settings {
  readonly experts: number;
  readonly hidden: number;
  readonly activation: Activation;
  readonly gated: boolean;
  readonly bias: boolean;
  readonly seed: number;
  readonly router: { readonly name: string; readonly options: { readonly [name: string]: Json } };
}

/** A weight of tf.layers. */
interface LayerVariable {
  read(): TfTensor;
}
/** What is used of tf.layers.Layer, its protected part included. */
interface BaseLayer {
  readonly name: string;
  readonly trainable: boolean;
  supportsMasking: boolean;
  getConfig(): Record<string, unknown>;
  addWeight(
    name: string,
    shape: readonly number[],
    dtype: string,
    initializer: { apply(): TfTensor },
    regularizer: undefined,
    trainable: boolean,
  ): LayerVariable;
}
type Shape = readonly (number | null)[];

/** A layer once its width is known. */
interface Built {
  readonly engine: Engine;
  readonly layer: MoELayer;
  readonly width: number;
  readonly params: Tree;
  readonly buffers: Tree;
  /** The variables of the leaves of `params`, in their order, then those of `buffers`. */
  readonly variables: readonly LayerVariable[];
  readonly bufferVariables: readonly LayerVariable[];
}

/** What a router may need here. `moe` supplies the first two, a backend that can block the third. */
const supplied: readonly Need[] = ["everyExpert", "mixedExperts", "host"];

/**
 * Registers the layer with TensorFlow.js and returns a factory of such layers. Call it once, also before a saved model is loaded.
 *
 * A layer takes [batch, width] or [batch, sequence, width] in float32 and gives the same shape; a mask of the layers before it
 * (`maskZero`) drops padding from experts and losses. The router's losses enter in training (`model.fit`) as if they were
 * added to the model's loss, though the loss that `fit` reports leaves them out. The backward pass runs the layer a second time
 * instead of keeping what lies inside it.
 *
 * @example
 * const moe = createMoE({ tf, layers: tf.layers, routers: { topK } });
 * model.add(moe({ experts: 8, hidden: 64, router: topK({ k: 2 }) }));
 * @throws UnsupportedError, when a layer is made, for a router that needs what tf.layers does not know (token ids, attention, a
 * state from layer to layer, an update after each step), or that `routers` cannot make again; ShapeError for inputs of other shapes.
 */
export function createMoE<L extends object>(library: MoELibrary<L>): (args: MoEArgs) => L {
  const tf = library.tf as TfCore & { readonly serialization: { registerClass(layer: object): unknown } };
  const engines = new Map<string, Engine>();
  const engineNow = (): Engine => {
    const name = tf.getBackend();
    const found = engines.get(name) ?? engine(tfjsNow(tf));
    engines.set(name, found);
    return found;
  };
  const Base: new (args: object) => BaseLayer = untyped(library.layers, "Layer");

  class MoE extends Base {
    static readonly className: string = "SwitchyardMoE";
    // Private by the language: the library's class has many fields of its own.
    readonly #settings: Settings;
    readonly #plugin: RouterPlugin;
    #built: Built | undefined;
    /** Passes in training so far: the place of the router's noise. */
    #steps = 0;

    constructor(args: MoEArgs) {
      super(args);
      const { experts, hidden, router, activation = "silu", gated = true, bias = false, seed = 0 } = args;
      refuse(router);
      checkRemade(library.routers, router);
      this.#plugin = router;
      this.#settings = {
        experts,
        hidden,
        activation,
        gated,
        bias,
        seed,
        router: { name: router.name, options: router.options ?? {} },
      };
      this.supportsMasking = true;
    }

    static fromConfig(
      layer: new (args: MoEArgs) => MoE,
      config: { readonly settings: { readonly name: string } },
    ): MoE {
      const { router, ...settings }: Settings = JSON.parse(config.settings.name);
      return new layer({ ...config, ...settings, router: remake(library.routers, router) });
    }

    override getConfig(): Record<string, unknown> {
      // TensorFlow.js changes the case of every string on the way to a file and back, but for those under the key "name".
      return { ...super.getConfig(), settings: { name: JSON.stringify(this.#settings) } };
    }

    computeOutputShape(inputShape: Shape | readonly Shape[]): Shape {
      return onlyShape(inputShape);
    }
    computeMask(_: unknown, mask: unknown): unknown {
      return Array.isArray(mask) ? mask[0] : mask;
    }

    build(inputShape: Shape | readonly Shape[]): void {
      const shape = onlyShape(inputShape);
      const width = shape.at(-1);
      if ((shape.length !== 2 && shape.length !== 3) || typeof width !== "number") {
        throw new ShapeError(
          `MoE ${this.name}: the input is [${shape.join(", ")}], expected [batch, width] or [batch, sequence, width] with a known width`,
        );
      }
      const { experts: count, hidden, activation, gated, bias, seed } = this.#settings;
      const device = engineNow();
      const draws = random(device, seed);
      const sizes = { count, width, hidden, bias, activation, engine: device, random: draws.at("experts") };
      const experts = (gated ? glu : ffn)(sizes);
      const layer = moeLayer(this.#plugin, { engine: device, width, random: draws.at("router") }, { experts });
      const params = layerParams(layer);
      const { buffers } = layer.router;
      if (layer.router.afterStep) {
        dispose([params, buffers]);
        throw new UnsupportedError(
          `MoE ${this.name}: the router ${this.#plugin.name} changes its state after each optimiser step, and tf.layers has no such moment; ` +
            "train it with core's trainer, or choose another router",
        );
      }
      const variable = (path: string, x: Tensor, trainable: boolean): LayerVariable =>
        this.addWeight(
          path,
          x.shape,
          x.dtype === "i32" ? "int32" : "float32",
          { apply: () => toTfjs(x) },
          undefined,
          trainable,
        );
      const variables = leaves(params).map(([path, x]) => variable(path, x, true));
      const bufferVariables = leaves(buffers).map(([path, x]) => variable(`buffers.${path}`, x, false));
      this.#built = { engine: device, layer, width, params, buffers, variables, bufferVariables };
      // From here on the variables hold the values; the trees only tell their places.
      dispose([params, buffers]);
    }

    call(
      inputs: TfTensor | readonly TfTensor[],
      kwargs: { readonly training?: unknown; readonly mask?: unknown },
    ): TfTensor {
      const x = onlyTensor(inputs);
      const built = this.#ready();
      if (x.dtype !== "float32") {
        throw new ShapeError(
          `MoE ${this.name}: the input is ${x.dtype} [${x.shape.join(", ")}], expected float32; put an embedding or dense layer before it`,
        );
      }
      if ((x.shape.length !== 2 && x.shape.length !== 3) || x.shape.at(-1) !== built.width) {
        throw new ShapeError(
          `MoE ${this.name}: the input is [${x.shape.join(", ")}], expected [batch, ${built.width}] or [batch, sequence, ${built.width}]`,
        );
      }
      const training = kwargs.training === true;
      const step = training ? this.#steps++ : this.#steps;
      const mask = maskOf(this.name, kwargs.mask, x.shape);
      const pass = { built, shape: x.shape, training, step, seed: this.#settings.seed };
      const weights = built.variables.map((weight) => weight.read());
      const { trainable } = this;
      // A frozen layer's weights are constants: no gradient is computed for them.
      const tracked = trainable ? [x, ...weights] : [x];

      const f = (...args: (TfTensor | ((tensors: readonly TfTensor[]) => void))[]) => {
        const save = args.at(-1);
        // What lies between layers is freed before the backward pass, unless it is saved; variables stay.
        if (typeof save === "function") save([x, ...(mask ? [mask] : [])]);
        const gradFunc = (dy: TfTensor, saved: readonly TfTensor[]): TfTensor[] =>
          backward(pass, {
            x: item(saved, 0),
            weights,
            mask: mask && item(saved, 1),
            dy,
            trainable,
          });
        return { value: forward(pass, { x, weights, mask }), gradFunc };
      };
      return Reflect.apply(tf.customGrad(f), tf, tracked);
    }

    #ready(): Built {
      if (!this.#built)
        throw new UnsupportedError(`MoE ${this.name}: call apply(), which builds the layer, not call()`);
      return this.#built;
    }
  }

  tf.serialization.registerClass(MoE);
  const Layer: new (args: MoEArgs) => L = untyped({ MoE }, "MoE");
  return (args) => new Layer(args);
}

/**
 * A member of a record, without its type: the library declares `addWeight` protected, which no type outside its class hierarchy can
 * name, so that our view of its Layer, and its view of ours, cannot be told to the compiler.
 */
const untyped = (record: object, name: string) => Reflect.get(record, name);

interface Pass {
  readonly built: Built;
  readonly shape: readonly number[];
  readonly training: boolean;
  readonly step: number;
  readonly seed: number;
}
interface Values {
  readonly x: TfTensor;
  readonly weights: readonly TfTensor[];
  readonly mask: TfTensor | undefined;
}

/** The layer's output, without a graph. */
function forward(pass: Pass, values: Values): TfTensor {
  return pass.built.engine.scope(() => {
    const { hidden, params } = adopt(pass, values);
    return toTfjs(reshape(run(pass, values.mask, hidden, params).output, pass.shape));
  });
}

/** Gradients of sum(output dy), in training plus the router's losses, with respect to x and, if wanted, the weights. */
function backward(pass: Pass, values: Values & { readonly dy: TfTensor; readonly trainable: boolean }): TfTensor[] {
  const { engine: device } = pass.built;
  return device.scope(() => {
    const outer = autodiff(device);
    const inner = adopt(pass, values);
    const hidden = watch(outer, inner.hidden);
    const params = values.trainable ? watch(outer, inner.params) : inner.params;
    const { output, routed } = run(pass, values.mask, hidden, params);
    const dy = reshape(fromTfjs(device, values.dy), hidden.shape);
    let objective = sum(mul(output, dy));
    if (pass.training) {
      for (const { value, weight } of Object.values(routed.losses)) {
        objective = add(objective, mul(reshape(value, []), weight));
      }
    }
    const gradients = grad<Tree>(objective, values.trainable ? { hidden, params } : { hidden });
    return leaves(gradients).map(([path, x]) => toTfjs(path === "hidden" ? reshape(x, pass.shape) : x));
  });
}

/** The tensors of one call on our engine, sharing storage with the library's. Inside a scope, which drops the references. */
function adopt({ built, shape }: Pass, { x, weights }: Values): { readonly hidden: Tensor; readonly params: Tree } {
  const { engine: device, params, width } = built;
  const hidden = reshape(fromTfjs(device, x), [sizeOf(shape.slice(0, -1)), width]); // [tokens, width]
  return { hidden, params: refill(device, params, weights) };
}

function run(
  { built, shape, training, step, seed }: Pass,
  mask: TfTensor | undefined,
  hidden: Tensor,
  params: Tree,
): ReturnType<typeof moe> {
  const { engine: device, layer, buffers, bufferVariables } = built;
  const [batch = 1, sequence = 1] = shape.length === 3 ? shape : [1, shape[0]];
  const layout: Layout = {
    batch,
    sequence,
    past: 0,
    ...(mask ? { mask: cast(fromTfjs(device, mask), "f32") } : {}),
  };
  const input = layerInput(layer, hidden, {
    layout,
    training,
    step,
    random: random(device, seed).at("noise", step),
    buffers: refill(
      device,
      buffers,
      bufferVariables.map((weight) => weight.read()),
    ),
  });
  return moe(layer, params, input, { metrics: false });
}

/** The same tree with the tensors of the library in its places. */
function refill(device: Engine, tree: Tree, tensors: readonly TfTensor[]): Tree {
  let next = 0;
  return mapTree(tree, () => fromTfjs(device, item(tensors, next++)));
}

// ---------------------------------------------------------------- arguments and masks
function onlyShape(shape: Shape | readonly Shape[]): Shape {
  const [first] = shape;
  if (!Array.isArray(first)) return shape as Shape;
  if (shape.length !== 1) throw new ShapeError(`MoE: ${shape.length} inputs; concatenate or add them first`);
  return first;
}

function onlyTensor(inputs: TfTensor | readonly TfTensor[]): TfTensor {
  if (!isList(inputs)) return inputs;
  const [x] = inputs;
  if (inputs.length !== 1 || !x) throw new ShapeError(`MoE: ${inputs.length} inputs; concatenate or add them first`);
  return x;
}
const isList = (x: TfTensor | readonly TfTensor[]): x is readonly TfTensor[] => Array.isArray(x);

/** The mask [batch, sequence] of a three-dimensional input. tf.layers hands a mask on to layers that it no longer fits. */
function maskOf(name: string, mask: unknown, shape: readonly number[]): TfTensor | undefined {
  if (!isTensor(mask) || shape.length !== 3) return undefined;
  if (!same(mask.shape, shape.slice(0, 2))) {
    throw new ShapeError(
      `MoE ${name}: the mask is [${mask.shape.join(", ")}], expected [${shape.slice(0, 2).join(", ")}]`,
    );
  }
  return mask;
}
const isTensor = (x: unknown): x is TfTensor => typeof x === "object" && x !== null && "dataId" in x && "shape" in x;

// ---------------------------------------------------------------- routers
function refuse(router: RouterPlugin): void {
  const missing = router.needs.filter((need) => !supplied.includes(need));
  if (missing.length > 0) {
    throw new UnsupportedError(
      `MoE: the router ${router.name} needs ${missing.join(", ")}; a tf.layers layer can supply ${supplied.join(", ")} only`,
    );
  }
}

/** A router's factory called with what its plugin reports. null stands for an option that was left out. */
function remake(routers: MoELibrary<object>["routers"], { name, options }: Settings["router"]): RouterPlugin {
  const factory = routers[name];
  if (!factory) {
    throw new UnsupportedError(
      `MoE: the router "${name}" is not among the routers ${Object.keys(routers).join(", ") || "(none)"}; ` +
        `createMoE({ ..., routers: { ${name} } }) makes models with it loadable`,
    );
  }
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null));
  // Options that a plugin of this factory reported: what it takes, though no type can say so here.
  return factory(given as never);
}

/** A model that could be saved but not loaded again is refused when it is made. */
function checkRemade(routers: MoELibrary<object>["routers"], router: RouterPlugin): void {
  const { name, options = {} } = router;
  const again = remake(routers, { name, options });
  const [found, expected] = [again, router].map((one) => JSON.stringify([one.name, one.options ?? {}]));
  if (found !== expected) {
    throw new UnsupportedError(
      `MoE: routers.${name} makes ${found} of the options of ${expected}; hand in the factory that made the router`,
    );
  }
}
