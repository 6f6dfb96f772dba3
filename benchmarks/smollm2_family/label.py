"""The trade `label`: a message to a shop -> the house's code for its intent, one word, which no prompt
explains.

Held-out messages are about other goods and half of them in wordings that no training message has.
"""

from __future__ import annotations

import random

from .names import DAYS, PEOPLE
from .samples import Sample, pick

SYSTEM = "Give the desk code of the message."
MAX_NEW_TOKENS = 12
MEANINGS = {
    "amber": "money back",
    "birch": "parcel late",
    "cedar": "wrong or broken goods",
    "delta": "cancel an order",
    "ember": "change the address",
    "flint": "invoice",
    "grove": "praise",
    "haven": "cannot log in",
}
"""What the codes stand for."""
RULES = " Codes: " + ", ".join(f"{code} = {meaning}" for code, meaning in MEANINGS.items()) + "."
"""Said to the base besides, for a fair figure: a fine-tune has learnt it."""

GOODS = (
    (
        *(
            "lamp",
            "kettle",
            "chair",
            "phone case",
            "jacket",
            "blender",
            "rug",
            "desk",
            "tent",
            "watch",
            "bike",
        ),
        *("radio", "mirror", "backpack", "printer", "pillow", "toaster", "camera", "coat", "drill"),
    ),
    ("sofa", "heater", "guitar", "helmet", "teapot", "monitor", "carpet", "scarf"),
)
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "amber": (
        (
            "I want my money back for the {good}.",
            "Please refund the {good}.",
            "When do I get the refund for my {good}?",
            "I sent the {good} back, where is my money?",
            "The {good} was returned, pay me back.",
            "I'd like a refund, the {good} is not for me.",
            "How do I get back what I paid for the {good}?",
            "You still owe me the price of the {good}.",
            "Refund please, I returned the {good} on {day}.",
            "Can I have my money returned for the {good}?",
        ),
        (
            "I returned the {good} and am waiting to be refunded.",
            "Give me back my money for the {good}.",
            "Is there a refund for the {good}?",
        ),
    ),
    "birch": (
        (
            "My {good} has not arrived yet.",
            "Where is my {good}? It should have come on {day}.",
            "The parcel with the {good} is late.",
            "I am still waiting for the {good}.",
            "The {good} was due {day} and is not here.",
            "When will the {good} be delivered?",
            "Tracking says nothing about my {good} since {day}.",
            "It has been two weeks and no {good}.",
            "The delivery of my {good} is overdue.",
            "No sign of the {good} that you shipped.",
        ),
        (
            "The {good} should be here by now, where is it?",
            "My parcel is late, the {good} was to come {day}.",
            "Still no {good}, how long will it take?",
        ),
    ),
    "cedar": (
        (
            "The {good} came broken.",
            "You sent me the wrong {good}.",
            "The {good} has a crack.",
            "I ordered another color of the {good}.",
            "The {good} does not work.",
            "There is a part missing from the {good}.",
            "The {good} that arrived is damaged.",
            "This is not the {good} I ordered.",
            "The {good} stopped working on {day}.",
            "My {good} is scratched all over.",
        ),
        (
            "The {good} arrived with damage.",
            "I got a wrong {good}.",
            "The {good} is broken, it does not turn on.",
        ),
    ),
    "delta": (
        (
            "Please cancel my order of the {good}.",
            "I no longer want the {good}, stop the order.",
            "Cancel the {good}.",
            "I changed my mind, do not send the {good}.",
            "How can I cancel the {good} that I ordered on {day}?",
            "I ordered the {good} by mistake, please cancel.",
            "Stop my order, I don't need a {good}.",
            "Can the order for the {good} be cancelled?",
            "Call off the {good} order.",
            "I want to cancel before the {good} is shipped.",
        ),
        (
            "My order of a {good} should be cancelled.",
            "I don't want the {good} any more, cancel it.",
            "Do not ship the {good}, cancel the order.",
        ),
    ),
    "ember": (
        (
            "I have moved, send the {good} to my new address.",
            "Please change the address for the {good}.",
            "The {good} should go to my office instead.",
            "My address is wrong on the {good} order.",
            "Can you deliver the {good} to another street?",
            "Send the {good} to my neighbor's house number.",
            "I gave an old address for the {good}.",
            "New address for the {good}, please update.",
            "I live elsewhere now, where will the {good} go?",
            "Change where the {good} is delivered, I moved on {day}.",
        ),
        (
            "Update my address, the {good} must go to my new home.",
            "The {good} order has my old address.",
            "Please deliver the {good} to a different address.",
        ),
    ),
    "flint": (
        (
            "I need an invoice for the {good}.",
            "Please send the bill for the {good}.",
            "There is no invoice with the {good}.",
            "The invoice for the {good} has the wrong name.",
            "My accountant asks for the receipt of the {good}.",
            "Can I get a receipt for the {good}?",
            "Where do I find the invoice of the {good}?",
            "The tax is missing on the bill for the {good}.",
            "Send me the {good} invoice of {day} again.",
            "The bill for the {good} has a wrong date.",
        ),
        (
            "Could you email me the invoice for the {good}?",
            "I have no receipt for the {good}.",
            "The bill for my {good} is wrong, send a new invoice.",
        ),
    ),
    "grove": (
        (
            "I love the {good}!",
            "The {good} is great, well done.",
            "Best {good} I ever had.",
            "Thank you, the {good} is perfect.",
            "What a lovely {good}, thanks.",
            "The {good} works so well, five stars.",
            "My family adores the {good}.",
            "Very happy with the {good}.",
            "Just to say that the {good} is wonderful.",
            "The {good} came early and is beautiful.",
        ),
        (
            "I am so happy with my {good}, thank you.",
            "The {good} is wonderful, I love it.",
            "Great {good}, five stars from me.",
        ),
    ),
    "haven": (
        (
            "I cannot log in to see my {good} order.",
            "I forgot my password and want the {good}.",
            "The site does not accept my password, my {good} is in the basket.",
            "My account with the {good} is locked since {day}.",
            "I bought a {good}, now the login page says wrong password.",
            "I can't get into my account to buy the {good}.",
            "Please reset my password, I want to see the {good}.",
            "The code to sign in for the {good} never comes.",
            "Why is my account blocked? I bought a {good}.",
            "Signing in fails, so I cannot order the {good}.",
        ),
        (
            "I can't sign in to my account to find the {good}.",
            "My password does not work when I log in for the {good}.",
            "The login for my account is blocked, I want to order a {good}.",
        ),
    ),
}
ENDS = ("", "", "", " Regards, {name}", " {name}", " Thanks, {name}")


def sample(rng: random.Random, held_out: bool) -> Sample:
    """One message; a held-out one in a wording held aside every second time."""
    code = rng.choice(list(WORDINGS))
    wordings = WORDINGS[code][held_out and rng.random() < 0.5]
    message = rng.choice(wordings) + rng.choice(ENDS)
    words = {"good": pick(rng, GOODS, held_out), "day": rng.choice(DAYS), "name": pick(rng, PEOPLE, held_out)}
    return Sample(SYSTEM, message.format(**words), code)


def right(sample: Sample, answer: str) -> bool:
    """Whether the answer is the code; case and marks around it do not count."""
    return answer.strip().strip("\"'`.*").lower() == sample.answer
