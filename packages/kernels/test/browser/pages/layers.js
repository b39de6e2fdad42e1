// The MoE layer in a model of tf.layers: trained with fit, saved, loaded.
import { createMoE } from "@switchyard/kernels/tfjs";
import { topK } from "@switchyard/routers/top-k";
import * as tf from "@tensorflow/tfjs-core";
import * as tfl from "@tensorflow/tfjs-layers";

const moe = createMoE({ tf, layers: tfl.layers, routers: { topK } });

/** Losses of a few epochs on TensorFlow.js's backend `name`, predictions of the model, and those after saving and loading. */
export async function fit(name) {
  await tf.setBackend(name);
  const kernelInitializer = tfl.initializers.glorotUniform({ seed: 1 });
  const model = tfl.sequential({
    layers: [
      tfl.layers.dense({ units: 8, inputShape: [2], kernelInitializer }),
      moe({ experts: 4, hidden: 6, router: topK({ k: 2 }), seed: 3 }),
      tfl.layers.dense({ units: 1, activation: "sigmoid", kernelInitializer }),
    ],
  });
  // Left out, the last argument is 1e-7 on one backend and 1e-4 on another.
  model.compile({ optimizer: tf.train.adam(0.03, 0.9, 0.999, 1e-7), loss: "binaryCrossentropy" });
  // Which points of a grid lie in the first or third quadrant.
  const points = Array.from({ length: 64 }, (_, i) => [(i % 8) - 3.4, Math.floor(i / 8) - 3.4]);
  const [x, y] = [tf.tensor2d(points), tf.tensor2d(points.map(([a, b]) => [a * b > 0 ? 1 : 0]))];
  const { history } = await model.fit(x, y, { epochs: 8, batchSize: 32, shuffle: false, verbose: 0 });

  let artifacts;
  await model.save(
    tf.io.withSaveHandler((saved) => {
      artifacts = saved;
      return { modelArtifactsInfo: { dateSaved: new Date(), modelTopologyType: "JSON" } };
    }),
  );
  const loaded = await tfl.loadLayersModel(tf.io.fromMemory(artifacts));
  const predictions = [];
  for (const one of [model, loaded]) {
    const predicted = one.predict(x);
    predictions.push([...(await predicted.data())]);
    predicted.dispose();
    one.dispose();
  }
  tf.dispose([x, y]);
  return { losses: history.loss, predictions };
}
