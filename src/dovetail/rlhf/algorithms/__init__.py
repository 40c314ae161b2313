"""The methods of policy optimisation, of which the engine runs one.

protocol      the interface of a method
ppo           advantages from a critic and the clipped surrogate
group         methods without a critic: GRPO and its kin, RLOO, REINFORCE++
imitation     best-of-n and expert iteration
named         a method by its name, or a user's own by its file
"""
