// Self-consistency (2203.11171): of the answers of several samples, the one most of them give.

export interface Vote {
  readonly answer: string;
  readonly votes: number;
}

/**
 * The most frequent answer and its votes; of equally frequent ones the first to appear. undefined stands for a sample without an answer,
 * which does not vote; where none has one, the result is undefined.
 */
export function majorityVote(answers: readonly (string | undefined)[]): Vote | undefined {
  const counts = new Map<string, number>();
  for (const answer of answers) if (answer !== undefined) counts.set(answer, (counts.get(answer) ?? 0) + 1);
  let best: Vote | undefined;
  for (const [answer, votes] of counts) if (best === undefined || votes > best.votes) best = { answer, votes };
  return best;
}
