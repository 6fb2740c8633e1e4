"""The one exception for bad input. Its text is the whole message, on one line."""


class UserError(ValueError):
    """Bad input that the user can fix.

    The text says what is wrong and what to do. It names arguments as Python spells them; the command line prints it
    with the flags instead and exits with code 2.

    >>> from bert_decomp import DecompositionConfig
    >>> try:
    ...     DecompositionConfig(encoder_fraction=1.5)
    ... except UserError as error:
    ...     print(error)
    encoder_fraction is 1.5...
    """
