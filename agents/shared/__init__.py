"""What several objectives need: learners, batches on and off the policy, replay, penalties."""
