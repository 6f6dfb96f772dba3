"""Built-in questions, as a model that has a chat template is asked them.

Those that rounding looks at and those that a model is judged by are apart.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer as Library

from blockzoo.build.tokenizer import ModelTokenizer
from blockzoo.runtime.api.errors import RequestError
from blockzoo.runtime.text.chat import ChatTemplate
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.chat_files import special_tokens, templates

CALIBRATION = (
    *("What is the largest ocean on Earth?", "Write a short poem about autumn.", "What is 25 plus 38?"),
    *("Explain how a bicycle stays upright.", "List five fruits that grow on trees.", "How does rain form?"),
    *(
        "Who painted the Mona Lisa?",
        "Translate 'thank you very much' into French.",
        "How do I make pancakes?",
    ),
    *("Name three musical instruments.", "Write a riddle about time.", "Why do leaves change colour?"),
    *("Give me advice for learning a new language.", "Tell me the plot of Romeo and Juliet."),
    *("Write a Python function that counts the vowels in a text.", "Who was Isaac Newton?"),
    *("What is the difference between weather and climate?", "Describe an old library."),
    *("Write a letter to a friend who has moved away.", "What are the advantages of public transport?"),
    *("How does a telephone work?", "What do I need for a camping trip?"),
    *("Explain what a variable is in programming.", "Write the beginning of a detective story."),
)
JUDGED = (
    *("What is the tallest mountain in the world?", "Write a limerick about a cat.", "How do magnets work?"),
    *("List four planets of the solar system.", "Who discovered penicillin?", "Why do we dream?"),
    *("How do you say 'see you tomorrow' in German?", "What are the primary colours?", "What is inflation?"),
    *("If a train travels 60 miles in an hour, how far does it go in 3 hours?", "What causes earthquakes?"),
    *("Give me ideas for a birthday present.", "Write a SQL query that counts the rows of a table."),
    *("Summarize the story of the tortoise and the hare.", "How can I save money each month?"),
    *("Write a product description for a coffee mug.", "What is the boiling point of water?"),
    *(
        "Describe your favourite season.",
        "How do birds find their way?",
        "Explain what an atom is to a pupil.",
    ),
    *("Write a JSON object that describes a book.", "Who was Cleopatra?", "What should I cook tonight?"),
    *("Why is it important to drink water?",),
)


def chats(tokenizer: ModelTokenizer, questions: Sequence[str], vocab_size: int) -> list[list[int]]:
    """Token ids of prompts that ask a model these questions, each in a chat of its own.

    None for a model without a chat template, or one that takes no such chat or needs tokens that the model of
    `vocab_size` tokens has not.
    """
    found = templates(tokenizer.files)
    if not found:
        return []
    template = ChatTemplate(found, special_tokens(tokenizer.files))
    library = Tokenizer(Library.from_buffer(tokenizer.files["tokenizer.json"]))
    try:
        texts = [template.render([{"role": "user", "content": question}]) for question in questions]
    except RequestError:
        return []
    prompts = [library.encode(text) for text in texts]
    return prompts if all(p and max(p) < vocab_size for p in prompts) else []
