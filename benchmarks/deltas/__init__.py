"""Full fine-tunes, and how near to themselves they are as differences to their base."""
