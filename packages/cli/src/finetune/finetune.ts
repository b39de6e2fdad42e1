// `switchyard finetune`: trains a loaded checkpoint on a text, whole, by low-rank adapters or the experts that the text uses, and saves it
// in the layout it had.
import { defineCommand } from "citty";
import { readArguments } from "../arguments.ts";
import { interruptible } from "../interrupt.ts";
import type { CommandLine } from "../main.ts";
import { progressBar } from "../progress.ts";
import type { Streams } from "../terminal.ts";
import { usageText } from "../usage.ts";
import { finetuneJob } from "./job.ts";
import { resultText } from "./result.ts";
import { finetuneArgs, requestOf } from "./settings.ts";

const finetuneCommand = defineCommand({
  meta: {
    name: "switchyard finetune",
    description: "Train a checkpoint on a text and save it in its own layout; what is not trained keeps its bytes",
  },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    out: { type: "positional", description: "A folder outside it, empty or absent", required: true },
    ...finetuneArgs,
  },
});

const example = `
EXAMPLE

  switchyard finetune my-model tuned --text novel.txt
  switchyard finetune my-model tuned --text novel.txt --esft 0.1 --steps 500
  switchyard finetune OLMoE-1B-7B tuned --text novel.txt --backend webgpu \\
    --lora experts,attention --rank 8
  switchyard finetune --resume tuned

Without --lora, --esft and --experts every parameter is trained. Together,
--lora experts and --esft train adapters beside the chosen experts alone.
AdamW in f32 without weight decay, gradients clipped at 1, a twentieth of the
steps to warm up, then a cosine to a tenth. Ctrl-C saves and says how to go on.
`;

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function finetune(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(finetuneCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("finetune", finetuneArgs, rest);
  const request = requestOf(given);
  const bar = progressBar(streams);
  const training = progressBar(streams, { patience: 0 });
  const end = (): void => {
    bar.end();
    training.end();
  };
  const note = (text: string): void => {
    end();
    streams.error(`${text}\n`);
  };
  let running = false;
  const begin = (): void => {
    running = true;
  };
  return interruptible(
    options,
    () => note(`${running ? "Finishing this step, then saving" : "Stopping"}. Ctrl-C again ends at once.`),
    async (signal) => {
      try {
        const outcome = await finetuneJob(request, { note, bar, training, signal, begin });
        end();
        if (outcome.status === "complete") {
          streams.out(
            given.flag("json") ? `${JSON.stringify(outcome.result)}\n` : resultText(outcome.result, request.out),
          );
          return 0;
        }
        if (outcome.status === "stopped") {
          const left = request.resume ? "the run is as it was" : "nothing is kept";
          note(`Stopped; ${left}.`);
        } else {
          const { steps, of } = outcome;
          note(`Saved after step ${steps} of ${of}. Continue with: switchyard finetune --resume ${request.out}`);
        }
        return 130;
      } finally {
        end();
      }
    },
  );
}
