"""What approximate reuse of KV costs a real model: tasks on real text, sides, yardsticks (`__main__`)."""
