"""Operations worth a GPU kernel: each is one function, with a plain JAX form that defines what it computes."""
