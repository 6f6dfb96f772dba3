"""What the text models of a server do with texts, beside the server."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.server_config.text_steps import Preprocessor


@pytest.mark.parametrize("text", ["a b", "<s>a b"])
def test_preprocessing_puts_one_bos_before_a_text(text):
    library = Library(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    step = Preprocessor({"tenant": Tokenizer(library)})
    tensors = step({"text_input@tenant": np.array([[text.encode()]], dtype=object)})
    assert tensors["input_ids"].tolist() == [[0, 2, 3]]
    assert tensors["model"].tolist() == [[b"tenant"]]
