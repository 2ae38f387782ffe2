"""What checks the library's annotations, shapes included, while tests run. As in type checkers, an int will do for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
