"""The methods of policy optimisation, of which the engine runs one.

protocol      the interface of a method
ppo           advantages from a critic and the clipped surrogate
group         methods without a critic: GRPO and its kin, RLOO, REINFORCE++
imitation     best-of-n and expert iteration
online_dpo    the loss of DPO on the best and the worst answer to a prompt
named         a method by its name, or a user's own by its file
"""
