// Checkpoints with recorded outputs on a page: every tensor of one pass, and greedy tokens.
import { chosenFiles, generate, httpFiles, readCheckpoint, readModel, recordLogits } from "@switchyard/models";

/** Where a checkpoint lies: files that were chosen on the page, or the address of a folder. */
const opened = ({ files, url }) => {
  const { open, list } = files ? chosenFiles(files) : { open: httpFiles(url) };
  return readCheckpoint(open, files ? "the chosen files" : url, list ? { list } : {});
};

async function greedyTokens(model, { prompt, greedy, cache }) {
  const ids = [];
  for await (const { id } of generate(model, { prompt, temperature: 0, maxNew: greedy, cache })) ids.push(id);
  return ids;
}

/** `requests`: { files or url, prompt, greedy: tokens to make }. Answers the tensors by name, and the tokens with and without a cache. */
export async function golden(on, requests) {
  const results = [];
  for (const request of requests) {
    const checkpoint = await opened(request);
    let loaded;
    try {
      loaded = await readModel(checkpoint, { engine: on });
    } catch (error) {
      await checkpoint.close();
      throw error;
    }
    const { model, close } = loaded;
    try {
      const tensors = await recordLogits(model, request.prompt);
      results.push({
        tensors: tensors.map(({ name, data }) => [name, Array.from(data)]),
        cached: await greedyTokens(model, { ...request, cache: true }),
        recomputed: await greedyTokens(model, { ...request, cache: false }),
      });
    } finally {
      await close();
    }
  }
  return { results };
}
