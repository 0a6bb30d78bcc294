// main.c: placeholder until the table of subcommands lands.
int main(void) {
    return 2;
}
