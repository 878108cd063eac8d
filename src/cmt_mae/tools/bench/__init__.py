"""How fast a step is: `cmt-mae bench`, and the count of its multiplications."""
