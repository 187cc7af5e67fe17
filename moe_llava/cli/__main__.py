from moe_llava.cli import main

main()
