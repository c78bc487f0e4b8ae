"""The whole method, naive: `python minimal.py` more than triples its reward in about a minute.

LILO (arXiv 2502.12272) with GRPO (2402.03300): sample more questions than needed, and train on
those whose responses disagree. The other files make each of these functions faster or better. In
tests/test_readme.py a test checks that loss and gradient are those of `ppo.update`."""

import torch

from data import arithmetic
from eval import grade
from plumbing.checkpoint import load_model
from sft import tiny_base


def sample(policy, tokenizer, question, n):
    """n responses to a question: the prompt's token ids, each response's, and the rewards (n,)."""
    prompt = tokenizer(question.prompt, return_tensors="pt").input_ids  # (1, prompt length)
    # top_k 0: sample from all tokens, as `logprobs` assumes (by default, only from the likeliest).
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 64}
    rollouts = policy.generate(prompt, num_return_sequences=n, **settings)  # (n, time)
    written = rollouts[:, prompt.shape[1] :]  # (n, longest response)
    stop = tokenizer.eos_token_id
    responses, rewards = [], []
    for tokens in written.tolist():
        # The stop token is part of the response: to stop is an action, too. Padding follows it.
        finished = stop in tokens
        response = tokens[: tokens.index(stop) + 1] if finished else tokens
        text = tokenizer.decode(response, skip_special_tokens=True)
        responses.append(response)
        rewards.append(grade(text, question) if finished else 0.0)  # cut off: worth 0
    return prompt[0].tolist(), responses, torch.tensor(rewards)


def learnability(rewards):
    """The variance of success, p (1 - p): 0 where all responses are right or all are wrong."""
    return rewards.var().item()  # unbiased; for s right of n: s (n - s) / (n (n - 1))


def logprobs(policy, prompt, response):
    """log pi(a_t | s_t) of each response token, (response length,)."""
    logits = policy(torch.tensor([prompt + response])).logits[0]  # (prompt + response, vocab)
    logits = logits[len(prompt) - 1 : -1]  # (response length, vocab): t predicts token t + 1
    chosen = torch.tensor(response)[:, None]  # (response length, 1)
    return logits.log_softmax(-1).gather(1, chosen)[:, 0]


def policy_loss(policy, batch, old_logprobs, clip=0.2):
    """PPO's clipped loss (1707.06347, eq. 7), averaged over response tokens. batch: of `sample`."""
    losses = []
    for (prompt, responses, rewards), old_of_group in zip(batch, old_logprobs):
        # GRPO: how much better than the group? Where all agree the std is 0, hence the 1e-6.
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # (n,)
        for response, advantage, old in zip(responses, advantages, old_of_group):
            new = logprobs(policy, prompt, response)
            ratio = (new - old).exp()  # r_t: 1 in the first epoch, but its gradient is not 0
            clipped = ratio.clamp(1 - clip, 1 + clip)
            # No gradient once r_t has moved by `clip`: up where the advantage is > 0, else down.
            losses.append(-torch.min(ratio * advantage, clipped * advantage))
    return torch.cat(losses).mean()


def train(policy, tokenizer, questions, iterations, size=8, n=8, epochs=1, lr=2e-4):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    for iteration in range(iterations):
        # 1. Choose: draw four times as many questions as needed, keep the most learnable.
        drawn = torch.randperm(len(questions))[: 4 * size]  # indices
        groups = [sample(policy, tokenizer, questions[i], n) for i in drawn]
        groups.sort(key=lambda group: learnability(group[2]), reverse=True)  # [2]: rewards
        batch = groups[:size]
        # 2. Remember log pi_old, of the policy that sampled: each optimizer step changes it.
        old_logprobs = []
        with torch.no_grad():
            for prompt, responses, _ in batch:
                old_logprobs.append([logprobs(policy, prompt, r) for r in responses])
        # 3. Update: in each epoch one optimizer step, on all responses of the batch.
        for _ in range(epochs):
            policy_loss(policy, batch, old_logprobs).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        reward = torch.stack([rewards for _, _, rewards in groups]).mean()
        print(f"iteration {iteration + 1}: mean reward of all that were drawn {reward:.3f}")


if __name__ == "__main__":
    policy, tokenizer = load_model(tiny_base("runs/cache"))
    # Chains of two, three and four steps, as many of each. The tiny model solves about a fifth.
    questions = arithmetic(600, seed=0, levels={2: 1, 3: 1, 4: 1})
    train(policy, tokenizer, questions, iterations=20)
