// The two layouts in which Hugging Face checkpoints store experts: one tensor per expert and matrix (what the Hub holds, Transformers
// up to 4.57), or all experts of a layer in one tensor, gate rows above up rows (what Transformers 5 works with, and saves with
// `save_original_format=False`). Names only: both hold the same numbers in the same order within an expert.

/** Where one matrix of one expert lies in a fused tensor `[experts, parts x rows, columns]`. */
export interface FusedPlace {
  /** Name of the fused tensor. */
  readonly fused: string;
  readonly expert: number;
  /** Which of its expert's matrices it is, from the top. */
  readonly part: number;
  /** Matrices of one expert in the fused tensor: gate and up, or down alone. */
  readonly parts: number;
}

/** How the names of a family differ between the two layouts. */
export interface ExpertLayout {
  /** The place of a per-expert tensor in the fused layout; undefined where the name is of no such tensor. */
  place(name: string): FusedPlace | undefined;
  /** The per-expert names that a fused tensor stands for, for one expert from the top; undefined for any other name. */
  separate(fused: string): ((expert: number) => readonly string[]) | undefined;
  /** Tensors that are no experts may be renamed too: the name in the fused layout. */
  fusedName(name: string): string;
  /** And back. */
  separateName(name: string): string;
}

interface Naming {
  /** The module with the experts. */
  readonly separate: string;
  readonly fused: string;
  readonly gate: string;
  readonly up: string;
  readonly down: string;
  /** What else changes its name in this module: in the per-expert layout, in the fused one. */
  readonly renamed?: readonly [separate: string, fused: string];
}

const projections: Naming = { separate: "mlp", fused: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" };
const numbered: Naming = { separate: "block_sparse_moe", fused: "mlp", gate: "w1", up: "w3", down: "w2" };

/** As in the conversion mapping of Transformers 5.18. */
const families: ReadonlyMap<string, Naming> = new Map([
  ["deepseek_v2", projections],
  ["deepseek_v3", projections],
  ["mixtral", numbered],
  ["olmoe", projections],
  ["phimoe", { ...numbered, renamed: ["gate.weight", "router.weight"] as const }],
  ["qwen2_moe", projections],
  ["qwen3_moe", projections],
]);

/** The values of `model_type` whose experts have two layouts. */
export const layoutFamilies: readonly string[] = [...families.keys()];

const escaped = (text: string): string => text.replaceAll(".", "\\.");

/** The names of a family; undefined where it has one layout only, or is unknown. */
export function expertLayout(modelType: string): ExpertLayout | undefined {
  const naming = families.get(modelType);
  if (!naming) return undefined;
  const { separate, fused, gate, up, down, renamed } = naming;
  const perExpert = new RegExp(
    `^(|.*\\.)${separate}\\.experts\\.(0|[1-9]\\d{0,8})\\.(${gate}|${up}|${down})\\.weight$`,
  );
  const together = new RegExp(`^(|.*\\.)${fused}\\.experts\\.(gate_up_proj|down_proj)$`);
  /** What stands in the module that holds router and experts. */
  const inside = (module: string): RegExp => new RegExp(`^(|.*\\.)${escaped(module)}\\.(.+)$`);
  const [separateOther, fusedOther] = renamed ?? [];
  const rename =
    (from: string, to: string, before: string | undefined, after: string | undefined) =>
    (name: string): string => {
      const [, prefix = "", rest] = inside(from).exec(name) ?? [];
      if (rest === undefined) return name;
      return `${prefix}${to}.${rest === before ? after : rest}`;
    };
  return {
    place(name) {
      const [, prefix = "", expert, matrix] = perExpert.exec(name) ?? [];
      if (expert === undefined) return undefined;
      const module = `${prefix}${fused}.experts`;
      return matrix === down
        ? { fused: `${module}.down_proj`, expert: Number(expert), part: 0, parts: 1 }
        : { fused: `${module}.gate_up_proj`, expert: Number(expert), part: matrix === gate ? 0 : 1, parts: 2 };
    },
    separate(name) {
      const [, prefix = "", matrix] = together.exec(name) ?? [];
      if (matrix === undefined) return undefined;
      const own = matrix === "down_proj" ? [down] : [gate, up];
      return (expert) => own.map((one) => `${prefix}${separate}.experts.${expert}.${one}.weight`);
    },
    fusedName: rename(separate, fused, separateOther, fusedOther),
    separateName: rename(fused, separate, fusedOther, separateOther),
  };
}
