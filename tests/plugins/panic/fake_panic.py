"""Raises what an extension written in Rust raises when it panics: not an Exception."""


class PanicException(BaseException):
    pass


raise PanicException("called `Option::unwrap()` on a `None` value")
